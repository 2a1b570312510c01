"""scripts/serve sets up once, again when what it installs has changed, and goes on after an interruption."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands in for Python: makes a "virtual environment" of itself and records what pip is asked for.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
-c*) exit "${FAKE_TOO_OLD:-0}" ;;
--version) echo "Python 3.x" ;;
"-m venv"*)
    for directory; do :; done
    mkdir -p "$directory/bin"
    cp "$0" "$directory/bin/python"
    printf '#!/bin/sh\\necho "minivllm $*"\\n' >"$directory/bin/minivllm"
    chmod +x "$directory/bin/minivllm"
    ;;
"-m pip --version") ;;
"-m pip install"*) echo "$*" >>"$FAKE_LOG"; exit "${FAKE_PIP:-0}" ;;
*) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


class Clone:
    """A clean clone's scripts, with a fake Python."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "pip.log"
        shutil.copytree(ROOT / "scripts", directory / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, directory)
        (directory / "fake-python").write_text(FAKE_PYTHON)
        (directory / "fake-python").chmod(0o755)

    def serve(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        defaults = {"PYTHON": str(self.directory / "fake-python"), "FAKE_LOG": str(self.log)}
        inherited = {name: value for name, value in os.environ.items() if name != "MINIVLLM_CONSTRAINTS"}
        return subprocess.run(
            [str(self.directory / "scripts" / "serve"), *arguments],
            env={**inherited, **defaults, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def installations(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_first_run_installs_and_second_does_not(clone: Clone) -> None:
    for _ in range(2):
        result = clone.serve("some/model", "--chat-template", "a b")
        assert (result.returncode, result.stdout) == (0, "minivllm serve some/model --chat-template a b\n")
        assert len(clone.installations()) == 1
    assert "-c constraints.txt --editable ." in clone.installations()[0]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_change_of_requirements_installs_again(clone: Clone, name: str) -> None:
    clone.serve()
    with (clone.directory / name).open("a") as file:
        file.write("# changed\n")
    assert clone.serve().returncode == 0
    assert len(clone.installations()) == 2


def test_interrupted_installation_is_tried_again(clone: Clone) -> None:
    result = clone.serve(FAKE_PIP="1")
    assert result.returncode == 1
    assert "installation failed" in result.stderr
    assert clone.serve().returncode == 0
    assert clone.serve().returncode == 0
    assert len(clone.installations()) == 2


def test_own_constraints_or_none(clone: Clone) -> None:
    own = clone.directory / "cuda.txt"
    own.write_text("torch==2.13.0\n")
    assert clone.serve(MINIVLLM_CONSTRAINTS=str(own)).returncode == 0
    assert f"-c {own}" in clone.installations()[-1]
    assert clone.serve(MINIVLLM_CONSTRAINTS="").returncode == 0
    assert "-c" not in clone.installations()[-1].split()
    result = clone.serve(MINIVLLM_CONSTRAINTS="/nosuch")
    assert result.returncode == 1
    assert result.stderr == "serve: MINIVLLM_CONSTRAINTS=/nosuch: no such file\n"


def test_too_old_python_is_one_clear_line(clone: Clone) -> None:
    result = clone.serve(FAKE_TOO_OLD="1")
    assert result.returncode == 1
    assert result.stderr == f"serve: PYTHON={clone.directory}/fake-python is not Python 3.11 or newer: Python 3.x\n"
    assert not (clone.directory / ".venv").exists()
