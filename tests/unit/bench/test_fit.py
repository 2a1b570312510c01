"""The cost model's fit: it finds what the samples were made of, and a fit of a real engine can be simulated."""

import json
from pathlib import Path

import pytest

from minivllm.bench.offline.fit import Sample, decode_sample, measure_fit, prefill_sample, solve
from minivllm.bench.offline.options import FitOptions
from minivllm.bench.offline.passes import PassShape, TimedDecode, TimedPrefill
from minivllm.bench.offline.watch import Watch
from minivllm.cli import main
from minivllm.errors import StartupError
from minivllm.simulate.cost_model import Curve, load_cost_model
from tests.support.cost_models import cost_model
from tests.support.models import TinyModels


def test_a_decode_fit_finds_base_and_context() -> None:
    curve = Curve((1, 4, 8), (0.02, 0.03, 0.05))
    timed = [
        TimedDecode(rows, context, curve(rows) + 1e-5 * context)
        for rows, context in ((1, 20), (4, 80), (8, 160), (1, 500), (4, 3000), (6, 900))
    ]
    found = solve([decode_sample(each, curve.sizes) for each in timed], 3)
    assert found == pytest.approx([*curve.seconds, 1e-5])


def test_a_prefill_fit_finds_base_pairs_and_rows() -> None:
    model = cost_model(prefill=Curve((8, 32), (0.01, 0.03)), prefill_per_pair=1e-6, prefill_per_row=1e-3)
    passes = [
        (PassShape(((0, 8),)),),
        (PassShape(((0, 32),)),),
        (PassShape(((0, 16), (0, 16))),),
        tuple(PassShape(((start, 32),)) for start in range(0, 320, 32)),
        (PassShape(((0, 20),)),),
    ]

    def seconds(shape: PassShape) -> float:
        pairs = sum(count * start + count * (count + 1) // 2 for start, count in shape.chunks)
        return model.prefill(shape.num_tokens) + 1e-6 * pairs + 1e-3 * (len(shape.chunks) - 1)

    timed = [TimedPrefill(shapes, sum(map(seconds, shapes))) for shapes in passes]
    assert solve([prefill_sample(each, (8, 32)) for each in timed], 2) == pytest.approx([0.01, 0.03, 1e-6, 1e-3])


def test_noise_makes_nothing_negative() -> None:
    samples = [Sample("a", [1.0, 10.0], 1.0), Sample("b", [1.0, 100.0], 0.9), Sample("c", [1.0, 200.0], 0.8)]
    base, slope = solve(samples, 1)
    assert slope == 0.0
    assert 0.8 < base < 1.0


def test_noise_does_not_make_the_smallest_pass_free() -> None:
    samples = [Sample("a", [1.0, 10.0], 0.9), Sample("b", [1.0, 20.0], 2.1), Sample("c", [1.0, 40.0], 4.3)]
    assert solve(samples, 1)[0] > 0.0


def test_noise_makes_no_larger_pass_cheaper() -> None:
    curve = Curve((1, 2, 4), (0.0, 0.0, 0.0))
    timed = [TimedDecode(rows, 0, seconds) for rows, seconds in ((1, 0.1), (2, 0.3), (4, 0.2))]
    first, second, third, _ = solve([decode_sample(each, curve.sizes) for each in timed], 3)
    assert first == pytest.approx(0.1)
    assert second == third
    assert 0.2 < second < 0.3


def test_a_fit_of_a_real_engine_can_be_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = TinyModels(tmp_path)["llama"]
    file = tmp_path / "fit.json"
    sizes = ["--batch-sizes", "1,3", "--context-lens", "8,32", "--prefill-sizes", "4,16", "--chunked-prompt-len", "64"]
    few = ["--num-decode-steps", "3", "--repeats", "1", "--max-num-batched-tokens", "16", "--device", "cpu"]
    assert main(["bench", "fit", str(directory), *sizes, *few, "--json", str(file)]) == 0
    assert "mean error" in capsys.readouterr().out
    model = load_cost_model(str(file))
    assert (model.max_num_batched_tokens, model.max_model_len, model.depth) == (16, 256, 0)
    assert (model.decode.sizes, model.prefill.sizes) == ((1, 3), (4, 16))
    content = json.loads(file.read_text())
    assert len(content["fits"]) == 4 + 5
    arguments = ["--cost-model", str(file), "--num-requests", "20", "--output-lens", "2,9", "--input-lens", "8,90"]
    assert main(["simulate", *arguments]) == 0


def test_requests_that_do_not_run_together_are_refused(tmp_path: Path) -> None:
    directory = TinyModels(tmp_path)["llama"]
    options = FitOptions(
        model=str(directory),
        device="cpu",
        batch_sizes=(1, 4),
        prefill_sizes=(8,),
        chunked_prompt_len=16,
        context_lens=(60, 100),
        num_gpu_blocks_override=16,
        repeats=1,
    )
    with Watch() as watch, pytest.raises(StartupError, match="do not run together"):
        measure_fit(options, directory, watch)
