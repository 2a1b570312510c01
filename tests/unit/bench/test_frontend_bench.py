"""`minivllm bench frontend`: real frontends between a stub engine and a load process; every token arrives."""

import json
from pathlib import Path

import pytest

from minivllm import cli
from minivllm.bench.frontend.command import _delivery
from minivllm.bench.serving.generator import LoadError
from minivllm.bench.serving.messages import Sample


def test_two_frontends(default_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    load = ["--streams", "6", "--output-len", "20", "--tokens-per-second", "3000", "--frontends", "2", "--repeats", "1"]
    assert cli.main(["bench", "frontend", str(default_model_dir), *load, "--json", str(file)]) == 0
    (result,) = json.loads(file.read_text())["results"]
    assert 0 < result["tokens_per_second"] < 4000, "the stub engine keeps its pace"
    assert 1.0 <= result["tokens_per_event"] <= 20.0
    assert "delivered tokens/s" in capsys.readouterr().out


def test_delivery_is_counted_from_the_first_to_the_last_event() -> None:
    samples = [Sample(0.0, 9.0, [1.0, 2.0, 3.0], 6), Sample(0.0, 9.0, [1.5, 4.0], 2)]
    delivery = _delivery(samples, frontend_seconds=8e-6, engine_seconds=4e-6, load_seconds=2e-6)
    assert delivery.tokens_per_second == pytest.approx(8 / 3)
    assert delivery.tokens_per_event == pytest.approx(8 / 5)
    assert (delivery.frontend_us, delivery.engine_us) == pytest.approx((1.0, 0.5))
    assert (delivery.itl_p50_ms, delivery.itl_p99_ms) == pytest.approx((1000, 2500))


def test_a_failed_request_is_no_measurement() -> None:
    with pytest.raises(LoadError, match="it broke"):
        _delivery([Sample(0.0, 1.0, [], error="it broke")], 1.0, 1.0, 1.0)
