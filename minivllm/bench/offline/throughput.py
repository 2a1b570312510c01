"""`minivllm bench throughput`: what a full machine delivers. By default the workload of nano-vllm's bench.py."""

from pathlib import Path

from engine_core.model_loader import choose_device
from minivllm.bench.offline.bench import Bench, vocab_size_of
from minivllm.bench.offline.hf import HFJob, time_hf
from minivllm.bench.offline.options import ThroughputOptions
from minivllm.bench.offline.profiling import profile
from minivllm.bench.offline.report import Comparison, Kernel, Measurement, Report
from minivllm.bench.offline.runs import MeasurementError, Run
from minivllm.bench.offline.shapes import model_name
from minivllm.bench.offline.watch import Watch
from minivllm.bench.offline.work import Work, nano_work
from minivllm.errors import StartupError

_NANO = (256, (100, 1024), (100, 1024))


def measure_throughput(options: ThroughputOptions, directory: Path, watch: Watch) -> Report:
    """Raises `StartupError`, `MeasurementError`."""
    if options.profile and choose_device(options).type != "cuda":
        raise StartupError("--profile needs a GPU")
    sizes = (options.num_requests, options.input_lens, options.output_lens)
    work = nano_work(*sizes, vocab_size_of(directory, options))
    part = work.part(options.compare_requests, options.compare_max_tokens)
    notes: list[str] = []
    hf_seconds = _time_hf(options, directory, part, watch, notes) if options.compare else None
    bench = Bench.load(options, directory, watch, options.temperature)
    name = "nano bench" if sizes == _NANO else f"random workload of {options.num_requests}"
    watch.plan(options.warmups + options.repeats + options.profile)
    for _ in range(options.warmups):
        bench.run(f"{name}, warm-up", work)
    run = bench.median_run(name, work, options.repeats)
    comparison = None
    if hf_seconds is not None:
        ours = run if part == work else bench.median_run("the part that is compared", part, options.repeats)
        comparison = Comparison.of(
            part.num_output_tokens / ours.seconds, part.num_output_tokens / hf_seconds, "tokens/s"
        )
    rows = throughput_rows(name, work, run, bench, comparison)
    kernels: list[Kernel] = []
    if options.profile:
        busy, kernels = _profile(bench, name, work)
        rows.append(Measurement("GPU busy", busy, "%"))
    return Report(
        title=f"Throughput: {model_name(options)}, {bench.description}, median of {options.repeats}",
        machine=bench.machine,
        measurements=rows,
        ceilings=bench.ceilings,
        notes=[_describe(work, run, options.temperature), *notes],
        kernels=kernels,
    )


def throughput_rows(name: str, work: Work, run: Run, bench: Bench, comparison: Comparison | None) -> list[Measurement]:
    """The roofline: the bytes of every decode pass that was run, and the arithmetic of prefill, one after the other."""
    num_bytes = bench.cost.decode_bytes(run.num_decode_passes, work.num_decode_reads)
    prefill = bench.cost.prefill_seconds(work, run.num_prefill_passes, bench.ceilings)
    limit = num_bytes / bench.ceilings.bytes_per_second + prefill
    num_passes = run.num_decode_passes + run.num_prefill_passes
    tokens = work.num_output_tokens
    return [
        Measurement(
            name,
            tokens / run.seconds,
            "tokens/s",
            limit=tokens / limit,
            gigabytes_per_second=num_bytes / run.seconds / 1e9,
            comparison=comparison,
        ),
        Measurement("whole run", run.seconds, "s", limit=limit),
        Measurement("mean pass", 1000 * run.seconds / num_passes, "ms", limit=1000 * limit / num_passes),
    ]


def _describe(work: Work, run: Run, temperature: float) -> str:
    return (
        f"{len(work.prompts)} requests at once, {work.num_prompt_tokens:,} tokens in, {work.num_output_tokens:,} out, "
        f"temperature {temperature:g}; {run.num_decode_passes:,} decode and {run.num_prefill_passes:,} prefill passes, "
        f"{run.num_preemptions} preemptions"
    )


def _profile(bench: Bench, name: str, work: Work) -> tuple[float, list[Kernel]]:
    """Busy share of one profiled run in percent, and its kernels."""
    run, busy_seconds, kernels = profile(lambda: bench.run(f"{name}, profiled", work))
    return 100 * busy_seconds / run.seconds, kernels


def _time_hf(options: ThroughputOptions, directory: Path, part: Work, watch: Watch, notes: list[str]) -> float | None:
    """Seconds that Hugging Face takes for `part`; None, and a note, when it fails."""
    job = HFJob(options, directory, [part], options.temperature, options.hf_batch_size, repeats=1)
    try:
        seconds = watch.run("Hugging Face generate()", lambda: time_hf(job)[0])
    except MeasurementError as error:
        notes.append(f"no comparison: {error}")
        return None
    notes.append(
        f"compared: the first {len(part.prompts)} requests with at most {max(part.output_lens)} output tokens each, "
        f"{part.num_output_tokens:,} in all, on both; Hugging Face in static batches of at most {options.hf_batch_size}"
    )
    return seconds
