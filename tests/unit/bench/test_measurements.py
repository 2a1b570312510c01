"""The benchmarks on a tiny random model: the work is done, counted and compared; what cannot be done is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_core.engine import EngineCore
from minivllm.bench.offline.hf import generate, load_hf
from minivllm.bench.offline.latency import latency_values, latency_works, measure_latency
from minivllm.bench.offline.options import LatencyOptions, StartupOptions, ThroughputOptions
from minivllm.bench.offline.runs import MeasurementError, run_work
from minivllm.bench.offline.startup import measure_startup
from minivllm.bench.offline.throughput import measure_throughput
from minivllm.bench.offline.watch import Watch
from minivllm.bench.offline.work import Work
from minivllm.cli import main
from minivllm.config import EngineConfig
from minivllm.errors import ModelError, StartupError
from tests.support.models import TinyModels, hf_greedy, random_prompt

ENGINE: dict[str, Any] = {"load_format": "dummy", "device": "cpu", "num_gpu_blocks_override": 64}
SMALL_LATENCY: dict[str, Any] = {
    "batch_sizes": (1, 2), "prompt_len": 5, "output_lens": (2, 40), "ttft_prompt_lens": (16,),
    "prefill_shape": (2, 8), "compare_output_lens": (2, 40), "repeats": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads of a tiny model would only wait for each other, and for whatever else this machine does."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that are started
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def watch() -> Iterator[Watch]:
    with Watch() as watch:
        yield watch


@pytest.fixture
def engine(tiny_config: Path) -> EngineCore:
    return EngineCore(EngineConfig.model_validate({"model": "tiny", **ENGINE}), tiny_config)


def test_a_run_does_the_same_work_again(engine: EngineCore) -> None:
    work = Work([[7] * 48, [8] * 5], [6, 9])
    first, again = (run_work(engine, work, 0.0) for _ in range(2))
    assert first.seconds > 0
    counts = (first.num_decode_passes, first.num_prefill_passes, first.num_preemptions)
    assert counts == (again.num_decode_passes, again.num_prefill_passes, again.num_preemptions) == (8, 1, 0)
    assert engine.stats().prefix_cache_hits == 0
    engine.check_integrity()


def test_a_run_that_ends_early_is_no_measurement(engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(batch: object) -> None:
        raise MemoryError("nothing left")

    monkeypatch.setattr(engine.runner, "launch", out_of_memory)
    with pytest.raises(MeasurementError, match="nothing left"):
        run_work(engine, Work([[1, 2, 3]], [4]), 0.0)


def test_latency_is_a_slope() -> None:
    options = LatencyOptions(**SMALL_LATENCY)
    works = latency_works(options, options.output_lens, 320)
    assert [(len(work.prompts), work.output_lens[0]) for _, work in works] == [
        (1, 2), (1, 40), (2, 2), (2, 40), (1, 1), (2, 1),
    ]  # fmt: skip
    values = latency_values(options, options.output_lens, [1.0, 4.8, 3.0, 2.0, 0.25, 0.5])
    assert values == pytest.approx(
        {"decode step, batch 1": 100.0, "first token, prompt of 16": 250.0, "prefill 2 × 8": 32.0}
    )  # batch 2 took less time for more tokens: no number


def test_latency_report_without_hugging_face_when_that_fails(
    tiny_config: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(job: object) -> list[float]:
        raise MeasurementError("out of memory?")

    monkeypatch.setattr("minivllm.bench.offline.latency.time_hf", fail)
    options = LatencyOptions(model=str(tiny_config), compare="hf", **ENGINE, **SMALL_LATENCY)
    report = measure_latency(options, tiny_config, watch)
    measured = {row.name: row for row in report.measurements}
    assert {"first token, prompt of 16", "prefill 2 × 8"} <= measured.keys()
    missing = {f"decode step, batch {n}" for n in (1, 2)} - measured.keys()
    assert all(any(name in note for note in report.notes) for name in missing)
    assert all(row.value > 0 and row.limit is not None and row.limit > 0 for row in report.measurements)
    assert report.title.startswith(f"Latency: {tiny_config}, random weights, float32 on cpu")
    assert "no comparison: out of memory?" in report.notes
    assert all(row.comparison is None for row in report.measurements)


def test_throughput_with_a_comparison(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "bench", "throughput", str(tiny_config), "--load-format", "dummy",
        "--device", "cpu", "--num-gpu-blocks-override", "64", "--num-requests", "3", "--input-lens", "4,9",
        "--output-lens", "5,8", "--repeats", "2", "--compare", "hf", "--compare-requests", "2",
        "--hf-batch-size", "1", "--json", str(tmp_path / "out.json"),
    ]  # fmt: skip
    assert main(arguments) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    rows = {row["name"]: row for row in content["measurements"]}
    comparison = rows["random workload of 3"]["comparison"]
    assert comparison["ratio"] == pytest.approx(comparison["ours"] / comparison["hf"])
    assert rows["random workload of 3"]["limit"] > 0
    assert content["options"]["num_requests"] == 3
    assert content["ceilings"]["bytes_per_second"] > 0
    out = capsys.readouterr().out
    assert "random workload of 3" in out
    assert "the first 2 requests" in out


def test_start_up_in_stages(tiny_config: Path, watch: Watch) -> None:
    report = measure_startup(StartupOptions(model=str(tiny_config), **ENGINE), tiny_config, watch)
    seconds = [row.value for row in report.measurements]
    assert len(seconds) == 4
    assert all(ready < first_token for ready, first_token in (seconds[:2], seconds[2:]))
    assert sum(cold for cold, _ in report.stages.values()) == pytest.approx(seconds[1])
    assert "loading the weights" in report.stages


def test_a_start_that_fails_is_no_measurement(tmp_path: Path, watch: Watch) -> None:
    with pytest.raises(MeasurementError, match="exit code 1"):
        measure_startup(StartupOptions(model="m", **ENGINE), tmp_path, watch)


def test_what_does_not_fit_is_refused(tiny_config: Path, watch: Watch) -> None:
    options = LatencyOptions(**ENGINE, **{**SMALL_LATENCY, "ttft_prompt_lens": (300,)})
    with pytest.raises(StartupError, match=r"prompt of 300.*max_model_len is 256"):
        measure_latency(options, tiny_config, watch)
    with pytest.raises(StartupError, match="--profile needs a GPU"):
        measure_throughput(ThroughputOptions(device="cpu", profile=True), tiny_config, watch)


def test_hugging_face_runs_the_untouched_model(tmp_path: Path) -> None:
    directory = TinyModels(tmp_path)["llama"]
    model = load_hf(EngineConfig(model=str(directory), device="cpu"), directory)
    assert model.config._attn_implementation == "sdpa"
    prompts = [random_prompt(5), random_prompt(11)]
    outputs = generate(model, Work(prompts, [9, 6]), 0.0)
    assert outputs == [hf_greedy(directory, prompts[0], 9), hf_greedy(directory, prompts[1], 6)]


def test_a_directory_without_a_configuration(tmp_path: Path, watch: Watch) -> None:
    with pytest.raises(ModelError):
        measure_latency(LatencyOptions(**ENGINE, **SMALL_LATENCY), tmp_path, watch)
