"""Imports run one way, and the checker that says so can fail."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FACADES = {"llm", "step_engine"}  # they drive an engine core in-process


def modules_loaded_by(*modules: str) -> set[str]:
    code = f"import sys; import {', '.join(modules)}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in result.stdout.split()}


def test_the_contract_loads_neither_torch_nor_http() -> None:
    names = [f"minivllm.{path.stem}" for path in (ROOT / "minivllm").glob("*.py") if path.stem not in FACADES]
    loaded = modules_loaded_by(*[name for name in names if not name.endswith("__")], "minivllm")
    assert "minivllm" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "numpy", "starlette", "uvicorn", "engine_core", "frontend"})


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def test_nothing_imports_the_facades() -> None:
    for path in [*ROOT.glob("minivllm/*.py"), *ROOT.glob("frontend/**/*.py"), *ROOT.glob("engine_core/**/*.py")]:
        if path != ROOT / "minivllm" / "__init__.py" and path.stem not in FACADES:
            assert imported_packages(path).isdisjoint({"minivllm.llm", "minivllm.step_engine"}), path


def check(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_imports_run_one_way() -> None:
    result = check(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("frontend/app.py", "import torch"),
        ("frontend/app.py", "from engine_core import engine"),
        ("engine_core/engine.py", "import frontend.app"),
        ("engine_core/engine.py", "import starlette"),
        ("engine_core/block_pool.py", "import engine_core.engine"),
        ("minivllm/config.py", "import transformers"),
        ("minivllm/config.py", "import frontend.app"),
    ],
)
def test_a_forbidden_import_breaks_the_check(tmp_path: Path, module: str, line: str) -> None:
    for package in ("minivllm", "frontend", "engine_core"):
        for source in (ROOT / package).rglob("*.py"):
            copy = tmp_path / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(source.read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = check(tmp_path)
    assert result.returncode == 1
    assert "BROKEN" in result.stdout
