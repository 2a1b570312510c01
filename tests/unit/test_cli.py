"""The command line: subcommands and exit codes (0, 1 and 2 here; 70 in test_launch)."""

import subprocess
import sys
from pathlib import Path

import pytest

from minivllm import __version__, cli
from minivllm.errors import ModelError


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"minivllm {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["nosuch"], ["--nosuch"]])
def test_unknown_command_is_2(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr().err


def test_bad_option_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["serve", "--port", "x"])
    assert exit_info.value.code == 2
    assert "--port" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "pull"])
def test_bad_model_is_1_with_one_line(command: str, tmp_path: Path) -> None:
    port = ["--port", "0"] if command == "serve" else []
    result = subprocess.run(
        [sys.executable, "-m", "minivllm", command, str(tmp_path), *port], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr == f"minivllm: error: {tmp_path} has no config.json: not a model directory\n"
    assert result.stdout == ""


@pytest.mark.parametrize(("error", "line"), [(ModelError("too large"), "too large"), (KeyboardInterrupt(), "interr")])
def test_errors_of_a_command_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, line: str
) -> None:
    def fail(arguments: object, prog: str) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "pull", cli.Command(fail, ""))
    assert cli.main(["pull"]) == 1
    stderr = capsys.readouterr().err
    assert line in stderr
    assert stderr.count("\n") == 1
