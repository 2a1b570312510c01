"""`minivllm bench latency`: what one user feels. Decode step, time to first token, prefill."""

import random
from collections.abc import Sequence
from pathlib import Path

from minivllm.bench.offline.bench import Bench, vocab_size_of
from minivllm.bench.offline.hf import HFJob, time_hf
from minivllm.bench.offline.options import LatencyOptions
from minivllm.bench.offline.report import Comparison, Measurement, Report, Unit
from minivllm.bench.offline.runs import MeasurementError, Run
from minivllm.bench.offline.shapes import model_name
from minivllm.bench.offline.watch import Watch
from minivllm.bench.offline.work import Work, uniform_work

Lens = tuple[int, int]


def measure_latency(options: LatencyOptions, directory: Path, watch: Watch) -> Report:
    """Raises `StartupError`, `MeasurementError`."""
    vocab_size = vocab_size_of(directory, options)
    notes: list[str] = []
    compared = _time_hf(options, directory, vocab_size, watch, notes) if options.compare else {}
    bench = Bench.load(options, directory, watch, options.temperature)
    works = latency_works(options, options.output_lens, vocab_size)
    watch.plan(len(works) * (options.repeats + 1))
    runs = []
    for name, work in works:
        bench.run(f"{name}, warm-up", work.part(None, 2))
        runs.append(bench.median_run(name, work, options.repeats))
    values = latency_values(options, options.output_lens, [run.seconds for run in runs])
    return Report(
        title=f"Latency: {model_name(options)}, {bench.description}, median of {options.repeats}",
        machine=bench.machine,
        measurements=[
            *_decode_rows(options, bench, values, compared, notes),
            *_prefill_rows(options, bench, works, runs, values, compared),
        ],
        ceilings=bench.ceilings,
        notes=[_describe(options), *notes],
    )


def _describe(options: LatencyOptions) -> str:
    short, long = options.output_lens
    return (
        f"decode: slope between {short} and {long} output tokens of {options.prompt_len}-token prompts; "
        f"temperature {options.temperature:g}"
    )


def latency_works(options: LatencyOptions, output_lens: Lens, vocab_size: int) -> list[tuple[str, Work]]:
    """In the order that `latency_values` reads: per batch size short and long output, first tokens, prefill."""
    source = random.Random(0)
    works = []
    for batch_size in options.batch_sizes:
        for length in output_lens:
            work = uniform_work(source, batch_size, options.prompt_len, length, vocab_size)
            works.append((f"{decode_name(batch_size)}, {length} tokens", work))
    for length in options.ttft_prompt_lens:
        works.append((ttft_name(length), uniform_work(source, 1, length, 1, vocab_size)))  # noqa: PERF401
    works.append((prefill_name(options), uniform_work(source, *options.prefill_shape, 1, vocab_size)))
    return works


def latency_values(options: LatencyOptions, output_lens: Lens, seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds per step and to the first token, tokens per second of prefill.

    A step is left out when the longer output took less time: the machine was too busy with something else.
    """
    times = iter(seconds)
    values = {}
    for batch_size in options.batch_sizes:
        short, long = next(times), next(times)
        values[decode_name(batch_size)] = 1000 * (long - short) / (output_lens[1] - output_lens[0])
    for length in options.ttft_prompt_lens:
        values[ttft_name(length)] = 1000 * next(times)
    num_prompts, length = options.prefill_shape
    values[prefill_name(options)] = num_prompts * length / next(times)
    return {name: value for name, value in values.items() if value > 0}


def decode_name(batch_size: int) -> str:
    """One step of so many requests."""
    return f"decode step, batch {batch_size}"


def ttft_name(prompt_len: int) -> str:
    """Time to first token of one prompt."""
    return f"first token, prompt of {prompt_len:,}"


def prefill_name(options: LatencyOptions) -> str:
    """Prefill of many prompts."""
    num_prompts, length = options.prefill_shape
    return f"prefill {num_prompts} × {length:,}"


def _decode_rows(
    options: LatencyOptions, bench: Bench, values: dict[str, float], compared: dict[str, float], notes: list[str]
) -> list[Measurement]:
    short, long = options.output_lens
    context = options.prompt_len + (short + long - 1) / 2  # mean tokens in the KV cache of one request
    rows = []
    for batch_size in options.batch_sizes:
        name = decode_name(batch_size)
        if name not in values:
            notes.append(f"no {name}: more output took less time; raise --repeats or --output-lens")
            continue
        num_bytes = bench.cost.decode_bytes(1, round(batch_size * context))
        rows.append(
            Measurement(
                name,
                values[name],
                "ms",
                limit=1000 * num_bytes / bench.ceilings.bytes_per_second,
                gigabytes_per_second=num_bytes / values[name] / 1e6,
                comparison=Comparison.of(values[name], compared[name], "ms") if name in compared else None,
            )
        )
    return rows


def _prefill_rows(
    options: LatencyOptions,
    bench: Bench,
    works: Sequence[tuple[str, Work]],
    runs: Sequence[Run],
    values: dict[str, float],
    compared: dict[str, float],
) -> list[Measurement]:
    rows = []
    first = 2 * len(options.batch_sizes)
    for (name, work), run in zip(works[first:], runs[first:], strict=True):
        seconds = bench.cost.prefill_seconds(work, run.num_prefill_passes, bench.ceilings)
        is_rate = name == prefill_name(options)
        unit: Unit = "tokens/s" if is_rate else "ms"
        rows.append(
            Measurement(
                name,
                values[name],
                unit,
                limit=work.num_prompt_tokens / seconds if is_rate else 1000 * seconds,
                teraflops_per_second=bench.cost.prefill_flops(work) / run.seconds / 1e12,
                comparison=Comparison.of(values[name], compared[name], unit) if name in compared else None,
            )
        )
    return rows


def _time_hf(
    options: LatencyOptions, directory: Path, vocab_size: int, watch: Watch, notes: list[str]
) -> dict[str, float]:
    """The same numbers of Hugging Face; none, and a note, when it fails."""
    lens = options.compare_output_lens
    works = [work for _, work in latency_works(options, lens, vocab_size)]
    job = HFJob(options, directory, works, options.temperature, options.hf_batch_size, options.repeats)
    try:
        values = latency_values(options, lens, watch.run("Hugging Face generate()", lambda: time_hf(job)))
    except MeasurementError as error:
        notes.append(f"no comparison: {error}")
        return {}
    notes.append(
        f"Hugging Face: same weights and prompts, static batches of at most {options.hf_batch_size}; "
        f"its decode step is the slope between {lens[0]} and {lens[1]} tokens"
    )
    return values
