"""Options of the benchmarks: the engine's and their own, from the same four places; shapes by name."""

import json
from pathlib import Path

import pytest

from minivllm import cli
from minivllm.bench.offline.options import BenchOptions, LatencyOptions, StartupOptions, ThroughputOptions
from minivllm.bench.offline.shapes import SHAPES, changed_config, located, model_name
from minivllm.config import EngineConfig
from minivllm.options import load_options

PROG = "minivllm bench"


def test_flag_environment_and_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("json: a.json\nbatch-sizes: [3]\nrepeats: 2\n")
    environ = {"MINIVLLM_REPEATS": "4", "MINIVLLM_MAX_NUM_SEQS": "5"}
    options = load_options(LatencyOptions, ["--config", str(file), "--batch-sizes", "1,2", "m"], PROG, environ)
    assert (options.batch_sizes, options.repeats, options.max_num_seqs) == ((1, 2), 4, 5)
    assert (options.json_, options.model) == (Path("a.json"), "m")
    assert load_options(LatencyOptions, ["--json", "b"], PROG, {"MINIVLLM_JSON": "c"}).json_ == Path("b")


@pytest.mark.parametrize("kind", [LatencyOptions, ThroughputOptions, StartupOptions])
def test_every_engine_option_is_in_the_help(kind: type[BenchOptions], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_options(kind, ["--help"], PROG, {})
    text = capsys.readouterr().out
    for name in kind.model_fields.keys() - {"model"}:
        assert "--" + name.rstrip("_").replace("_", "-") in text
    assert EngineConfig.model_fields.keys() <= kind.model_fields.keys()


@pytest.mark.parametrize(
    ("kind", "argv", "words"),
    [
        (LatencyOptions, ["--output-lens", "9,9"], "output_lens must be short,long, got 9,9"),
        (LatencyOptions, ["--output-lens", "9"], "--output-lens"),
        (LatencyOptions, ["--batch-sizes", "0"], "--batch-sizes"),
        (ThroughputOptions, ["--input-lens", "9,3"], "input_lens must be shortest,longest, got 9,3"),
        (ThroughputOptions, ["--compare", "vllm"], "--compare: must be 'hf', got 'vllm'"),
        (StartupOptions, ["--shape", "gpt-5"], "--shape"),
        (StartupOptions, ["m", "--shape", "qwen3-0.6b"], "--shape qwen3-0.6b and MODEL m"),
        (StartupOptions, ["--vocab-size", "9"], "--vocab-size and --num-hidden-layers need --shape"),
    ],
)
def test_bad_options_are_named(
    kind: type[BenchOptions], argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        load_options(kind, argv, PROG, {})
    assert exit_info.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["nosuch"], 2)])
def test_which_benchmark(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *argv]) == code
    captured = capsys.readouterr()
    assert "bench" in (captured.err if code else captured.out)


@pytest.mark.parametrize("shape", ["qwen3-0.6b", "llama-3.1-8b"])
def test_a_shape_is_a_directory_with_random_weights(shape: str) -> None:
    options = load_options(StartupOptions, ["--shape", shape], PROG, {})
    with located(options) as (resolved, directory):
        assert directory == SHAPES / shape
        assert (resolved.model, resolved.load_format) == (str(directory), "dummy")
    assert model_name(options) == f"{shape} shape, random weights"


def test_a_changed_shape_lives_as_long_as_it_is_used() -> None:
    argv = ["--shape", "qwen3-0.6b", "--vocab-size", "500", "--num-hidden-layers", "3"]
    with located(load_options(StartupOptions, argv, PROG, {})) as (resolved, directory):
        content = json.loads((directory / "config.json").read_text())
        assert (content["vocab_size"], content["num_hidden_layers"], content["hidden_size"]) == (500, 3, 1024)
        assert content["eos_token_id"] is None
        assert resolved.model == str(directory)
    assert not directory.exists()


def test_changed_config_keeps_what_fits() -> None:
    content = {"layer_types": ["a", "b", "c"], "eos_token_id": [3, 900], "bos_token_id": 3, "vocab_size": 1000}
    changed = changed_config(content, {"num_hidden_layers": 2, "vocab_size": 10})
    assert changed["layer_types"] == ["a", "b"]
    assert (changed["eos_token_id"], changed["bos_token_id"]) == (None, 3)
