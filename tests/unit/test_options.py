"""Options: four sources, their order, and errors that name the option."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minivllm.config import DEFAULT_MODEL, ModelConfig, ServeConfig
from minivllm.options import env_name, load_config, load_options

PROG = "minivllm serve"


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(SystemExit) as exit_info:
        load_config(argv, PROG, environ or {})
    assert exit_info.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    return stderr


def test_defaults() -> None:
    config = load_config([], PROG, {})
    assert config == ServeConfig()
    assert config.model == DEFAULT_MODEL


def test_precedence_flag_environment_file_default(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("port: 1\nmax-num-seqs: 2\nblock_size: 3\n")
    argv = ["--config", str(file), "--port", "30"]
    config = load_config(argv, PROG, {"MINIVLLM_PORT": "20", "MINIVLLM_MAX_NUM_SEQS": "21", "MINIVLLM_HOST": ""})
    assert (config.port, config.max_num_seqs, config.block_size, config.host) == (30, 21, 3, "127.0.0.1")


def test_every_option_has_flag_variable_and_file_entry(tmp_path: Path) -> None:
    values = {
        bool: "true", int: "6", float: "0.5", str: "text", Path: "some/path", tuple: "http://a,http://b",
    }  # fmt: skip
    special = {"load_format": "dummy", "dtype": "bfloat16", "device": "cpu", "log_format": "json"}
    for name, default in ServeConfig().model_dump(exclude={"inject_faults"}).items():  # that one needs another
        text = special.get(name) or values.get(type(default), "6")
        from_environment = load_config([], PROG, {env_name(name): text})
        assert getattr(from_environment, name) != default or text == "true"
        flag = [text] if name == "model" else [f"--{name.replace('_', '-')}", *([] if text == "true" else [text])]
        assert load_config(flag, PROG, {}) == from_environment
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({name: from_environment.model_dump(mode="json")[name]}))
        assert load_config(["--config", str(file)], PROG, {}) == from_environment


def test_resolved_options_survive_the_way_to_the_children(tmp_path: Path) -> None:
    config = ServeConfig(model="m", allowed_origins=("http://a",), socket_dir=tmp_path, max_model_len=99, api_key="k")
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())
    assert load_config(["--config", str(file)], "python -m engine_core", {}) == config


def test_switches() -> None:
    assert load_config(["--no-enable-prefix-caching"], PROG, {}).enable_prefix_caching is False
    assert load_config(["--no-enforce-eager"], PROG, {"MINIVLLM_ENFORCE_EAGER": "1"}).enforce_eager is False
    assert load_config(["--allowed-origins", "http://a, http://b"], PROG, {}).allowed_origins == (
        "http://a",
        "http://b",
    )


@pytest.mark.parametrize(
    ("argv", "environ", "parts"),
    [
        (["--port", "99999"], {}, ["--port: must be less than or equal to 65535", "'99999'"]),
        (["--port", "abc"], {}, ["--port: must be a valid integer, got 'abc'"]),
        (["--dtype", "int4"], {}, ["--dtype: must be 'auto', 'float32'", "'int4'"]),
        (["--max-model-len", "1"], {}, ["max_model_len", "got 1"]),
        (["--gpu-memory-utilization", "0"], {}, ["--gpu-memory-utilization: must be greater than 0"]),
        (["--inject-faults", "drop=0.1"], {}, ["--inject-faults needs --enable-debug"]),
        (["--enable-debug", "--inject-faults", "drop=7"], {}, ["--inject-faults: 'drop=7' is not a fault"]),
        (["--bogus"], {}, ["unrecognized arguments: --bogus"]),
        (["--por", "1"], {}, ["unrecognized arguments: --por"]),
        (["--port"], {}, ["--port", "expected one argument"]),
        (["one", "two"], {}, ["unrecognized arguments: two"]),
        ([], {"MINIVLLM_PORT": "x"}, ["MINIVLLM_PORT: must be a valid integer"]),
        ([], {"MINIVLLM_DISABLE_LOG_STATS": "maybe"}, ["MINIVLLM_DISABLE_LOG_STATS: must be a valid boolean"]),
        (["--config", "/nonexistent.yaml"], {}, ["--config /nonexistent.yaml", "No such file"]),
    ],
)
def test_bad_values_are_one_line_that_names_the_option(
    capsys: pytest.CaptureFixture[str], argv: list[str], environ: dict[str, str], parts: list[str]
) -> None:
    message = error_of(capsys, argv, environ)
    assert message.startswith("minivllm serve: error: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("port: [", "while parsing"),
        ("- port", "got a list"),
        ("prot: 1", "unknown option prot"),
        ("port: never", "port in FILE: must be a valid integer"),
    ],
)
def test_bad_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    assert part.replace("FILE", str(file)) in error_of(capsys, ["--config", str(file)])


def test_a_key_is_never_echoed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("api_key: 123456")
    message = error_of(capsys, ["--config", str(file)])
    assert "api_key" in message
    assert "123456" not in message
    assert "secret" not in repr(ServeConfig(api_key="secret"))


def test_help_tells_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        load_config(["--help"], PROG, {})
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for name, field in ServeConfig.model_fields.items():
        assert name == "model" or f"--{name.replace('_', '-')}" in text
        assert field.description
    assert "[8000]" in text
    assert "[0]" in text
    assert "--no-enable-prefix-caching" in text


def test_a_command_takes_only_its_own_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("port: 1\nrevision: main\n")  # one file may serve several commands
    assert load_options(ModelConfig, ["m", "--config", str(file)], "minivllm pull", {}).revision == "main"
    with pytest.raises(SystemExit):
        load_options(ModelConfig, ["--port", "1"], "minivllm pull", {})
    assert "--port" in capsys.readouterr().err


def test_reading_options_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from minivllm.options import load_config; load_config([], 'x', {});"
        "print([m for m in ('torch', 'transformers', 'numpy', 'rich', 'huggingface_hub', 'yaml') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
