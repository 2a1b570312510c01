"""What the README and the architecture page say exists: files, options, fields, commands, and snippets that parse."""

import ast
import importlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from frontend.schemas import GenerateRequest
from minivllm.bench.serving.options import ServeBenchOptions
from minivllm.cli import COMMANDS
from minivllm.config import ServeConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = ("minivllm", "frontend", "engine_core")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every line of the shell blocks, without its comment."""
    return [line.partition("  #")[0].strip() for block in code_blocks("sh") for line in block.splitlines() if line]


def test_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert "docs/architecture.md" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("text", [README, ARCHITECTURE], ids=["readme", "architecture"])
def test_options_exist(text: str) -> None:
    others = {"--help", "--config", "--strict", "--requests", "--rounds", "--all"}  # of every command, mypy, scripts/*
    others |= {"--" + name.replace("_", "-") for name in ServeBenchOptions.model_fields}
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - others
    assert mentioned
    assert mentioned <= {"--" + name.replace("_", "-") for name in ServeConfig.model_fields}


def test_scripts_and_subcommands_exist() -> None:
    scripts = re.findall(r"\bscripts/(\w+)", README)
    assert {"serve", "test", "check", "numbers"} <= set(scripts)
    assert [name for name in scripts if not (ROOT / "scripts" / name).is_file()] == []
    assert set(re.findall(r"\bminivllm ([a-z]+)\b", " ".join(commands()))) <= set(COMMANDS)


def test_shell_blocks_parse() -> None:
    for block in code_blocks("sh"):
        script = block.replace("<this repository>", "repository")
        subprocess.run(["sh", "-n"], input=script, text=True, check=True)


def test_the_curl_example_is_a_valid_request() -> None:
    (curl,) = (command for command in commands() if command.startswith("curl"))
    (body,) = re.findall(r"-d '(.*)'", curl)
    assert GenerateRequest.model_validate_json(body).messages


def test_python_examples_name_what_exists() -> None:
    blocks = code_blocks("python")
    assert len(blocks) == 4
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_python_client_sends_a_valid_request() -> None:
    (assignment,) = (
        node
        for node in ast.walk(ast.parse(code_blocks("python")[0]))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "body"
    )
    assert GenerateRequest.model_validate_json(json.dumps(ast.literal_eval(assignment.value))).messages


def test_all_request_fields_are_listed() -> None:
    (paragraph,) = re.findall(r"Fields of `/generate`:.*?\n\n", README, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", paragraph)) == set(GenerateRequest.model_fields)


def test_the_architecture_page_has_every_module() -> None:
    """One line per module, and no line for a module that is gone; `name/` stands for a folder."""
    (block,) = re.findall(r"^## Modules\n+```\n(.*?)^```$", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    listed, package = set(), ""
    for line in block.splitlines():
        if not line.startswith(" "):
            package = line.partition("/")[0]
            continue
        names = re.match(r"  ([\w/]+(?:, [\w/]+)*)  ?", line)
        assert names, line
        listed |= {f"{package}/{name}" for name in names[1].split(", ")}
    folders = tuple(name for name in listed if name.endswith("/"))
    files = (file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    modules = {str(file.with_suffix("")) for file in files if file.name != "__init__.py"}
    assert {module for module in modules if not module.startswith(folders)} == listed - set(folders)
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_the_architecture_page_names_functions_that_exist() -> None:
    """The steps of one request: file, then functions."""
    (block,) = re.findall(r"^## One request\n+```\n(.*?)^```$", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    steps = re.findall(r"^ ?\d+  (\S+\.py) +(\S+(?:, \w+| … \w+)*)", block, re.MULTILINE)
    assert len(steps) == len(block.splitlines())
    for file, names in steps:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        assert set(re.findall(r"\w+", names)) <= defined, file
