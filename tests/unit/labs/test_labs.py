"""Every lab on a tiny model with --quick: a number, what breaking it did, a picture, and lines of code that exist."""

import re
from pathlib import Path

import pytest

from engine_core.engine import EngineCore
from engine_core.scheduler import Scheduler
from minivllm.cli import main
from minivllm.config import EngineConfig
from minivllm.errors import StartupError
from minivllm.labs.catalogue import LABS
from minivllm.labs.devices import Devices
from minivllm.labs.sheet import code_reference
from minivllm.labs.streaming import account
from minivllm.sampling_params import SamplingParams
from tests.support.models import TinyModels, hf_greedy

ROOT = Path(__file__).parents[3]
PROMPT = list(range(3, 43))


@pytest.fixture(scope="module")
def sheets(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the sheets of all labs, on a configuration without weights and without a tokenizer."""
    directory = tmp_path_factory.mktemp("sheets")
    model = (str(tiny_models["llama"]), "--load-format", "dummy", "--device", "cpu")
    assert main(["lab", "all", *model, "--quick", "--out", str(directory)]) == 0
    return directory


@pytest.mark.parametrize("name", LABS)
def test_a_lab_writes_its_sheet(name: str, sheets: Path) -> None:
    sheet = (sheets / f"{name}.md").read_text()
    assert "<svg" in (sheets / f"{name}.svg").read_text()
    assert f"]({name}.svg)" in sheet
    assert LABS[name].break_it in sheet
    assert "nan" not in sheet.lower().split()
    places = re.findall(r"`[\w.]+` in ([\w/]+\.py):(\d+)-(\d+)", sheet)
    assert len(places) >= 2
    for file, first, last in places:
        lines = (ROOT / file).read_text().splitlines()[int(first) - 1 : int(last)]
        assert re.match(r"\s*(@|def |async def |class )", lines[0])


def test_the_streaming_lab_measures_a_real_server(sheets: Path) -> None:
    sheet = (sheets / "streaming.md").read_text()
    parts = {
        name: float(us.replace(",", "")) for name, us in re.findall(r"^\| ([^|]+) \| ([\d,.]+) \|", sheet, re.MULTILINE)
    }
    assert parts["forward pass and sampling"] > parts["detokenizer"] > 0


def test_the_parts_of_a_tokens_way_fill_the_time_between_two_tokens_or_overlap() -> None:
    apart = account(0.040, {"wire": 0.001, "event": 0.002}, mean=0.045)
    assert sum(apart.parts.values()) == pytest.approx(0.045)
    assert (apart.sentence, apart.notes) == (
        "40.0 ms of it are the forward pass, 5.00 ms everything after it.",
        [],
    )
    beside = account(0.001, {"wire": 4e-6, "event": 2e-6}, mean=0.001)
    assert list(beside.parts) == ["forward pass and sampling", "wire", "event"]
    assert "6.00 µs after it overlap with the next one" in beside.sentence
    assert "sum to 6.00 µs more than the time between two tokens" in beside.notes[0]


def test_a_lab_prints_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "paging", "--shape", "qwen3-0.6b", "--quick", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert "Broken on purpose: contiguous slots" in capsys.readouterr().out
    assert "qwen3-0.6b shape, random weights" in (tmp_path / "paging.md").read_text()


def test_engines_of_one_loaded_model_are_right_one_after_the_other(tiny_models: TinyModels) -> None:
    directory, devices = tiny_models["llama"], Devices()
    engines = [
        EngineCore(
            EngineConfig(model="tiny", device="cpu", num_gpu_blocks_override=blocks), directory, load=devices.load
        )
        for blocks in (None, 3)
    ]
    assert engines[0].model is engines[1].model
    assert (engines[1].kv_pool.num_blocks, engines[1].max_model_len) == (3, 48)
    for engine in engines:
        engine.add_request("a", PROMPT, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=8))
        tokens = [token for _ in range(20) for output in engine.step() for token in output.token_ids]
        assert tokens == hf_greedy(directory, PROMPT, 8)
        engine.check_integrity()


def test_more_blocks_than_loaded_are_refused(tiny_models: TinyModels) -> None:
    config = EngineConfig(model="tiny", device="cpu", kv_cache_memory_bytes=1 << 20, num_gpu_blocks_override=10**6)
    with pytest.raises(StartupError, match="1000000 blocks for 256 requests are more than"):
        Devices().load(config, tiny_models["llama"], lambda detail: None)


def test_code_references_are_computed() -> None:
    name, place = code_reference(Scheduler.schedule)
    assert name == "Scheduler.schedule"
    file, _, lines = place.partition(":")
    first = int(lines.split("-")[0])
    assert (ROOT / file).read_text().splitlines()[first - 1].strip().startswith("def schedule(")


def test_the_list_names_every_lab(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in LABS)
    assert len(LABS) == 8


def test_an_unknown_lab_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "alchemy"]) == 2
    assert "unknown lab 'alchemy'" in capsys.readouterr().err


def test_without_matplotlib_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minivllm.plots.find_spec", lambda name: None)
    assert main(["lab", "paging"]) == 1
    assert "pip install 'mini-vllm[plot]'" in capsys.readouterr().err
