"""Every lab on a tiny model with --quick: a number, what breaking it did, a picture, and lines of code that exist."""

import re
from pathlib import Path

import pytest

from engine_core.scheduler import Scheduler
from minivllm.cli import main
from minivllm.labs.catalogue import LABS
from minivllm.labs.sheet import code_reference
from tests.support.models import TinyModels

ROOT = Path(__file__).parents[3]
IN_PROCESS = [name for name in LABS if name != "streaming"]


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_lab_writes_its_sheet(
    name: str, tiny_models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_models["llama"])
    assert main(["lab", name, model, "--quick", "--out", str(tmp_path), "--device", "cpu"]) == 0
    check_sheet(name, tmp_path)
    assert "Broken on purpose" in capsys.readouterr().out


def test_the_streaming_lab_measures_a_real_server(default_model_dir: Path, tmp_path: Path) -> None:
    assert main(["lab", "streaming", str(default_model_dir), "--quick", "--out", str(tmp_path), "--device", "cpu"]) == 0
    check_sheet("streaming", tmp_path)
    sheet = (tmp_path / "streaming.md").read_text()
    parts = {
        name: float(us.replace(",", "")) for name, us in re.findall(r"^\| ([^|]+) \| ([\d,.]+) \|", sheet, re.MULTILINE)
    }
    assert parts["forward pass and sampling"] > parts["detokenizer"] > 0


def check_sheet(name: str, directory: Path) -> None:
    sheet = (directory / f"{name}.md").read_text()
    assert "<svg" in (directory / f"{name}.svg").read_text()
    assert f"]({name}.svg)" in sheet
    assert LABS[name].break_it in sheet
    assert "nan" not in sheet.lower().split()
    places = re.findall(r"`[\w.]+` in ([\w/]+\.py):(\d+)-(\d+)", sheet)
    assert len(places) >= 2
    for file, first, last in places:
        lines = (ROOT / file).read_text().splitlines()[int(first) - 1 : int(last)]
        assert re.match(r"\s*(@|def |async def |class )", lines[0])


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
