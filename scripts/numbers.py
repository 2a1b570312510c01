"""Measures what the README says of prefill and decode, the KV cache and continuous batching, on this machine's CPU.

Every time is the median of several rounds. Hugging Face's `generate()` runs beside the engine, in the same process, on
the same prompts and output lengths, and its tokens are compared.
"""

import argparse
import itertools
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from minivllm import LLM, MiniVLLMEngine, SamplingParams
from minivllm.config import DEFAULT_MODEL, ModelConfig
from minivllm.model_store import resolve_model

PREFILL_WORDS = 256  # about as many tokens
NUM_DECODE_STEPS = 16
WIDTH = 8  # requests that run at once
PROMPT_LENS, OUTPUT_LENS = (16, 64), (8, 64)
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")


class Work(NamedTuple):
    """Requests of mixed lengths."""

    prompts: list[list[int]]
    output_lens: list[int]

    def static_batches(self) -> Iterator["Work"]:
        """`WIDTH` requests at a time, in order."""
        for start in range(0, len(self.prompts), WIDTH):
            yield Work(self.prompts[start : start + WIDTH], self.output_lens[start : start + WIDTH])


Generate = Callable[[Work], list[list[int]]]  # output tokens of every request


class Step(NamedTuple):
    """Seconds of the two kinds of pass."""

    prefill_per_token: float
    decode: float


def main() -> None:
    """Measure and print."""
    options = _parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=100)
    console.print(f"{options.model}, float32, {_machine()}, {date.today()}")  # noqa: DTZ011
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("prefill and decode", total=options.rounds * (2 + len(WAYS)))
        advance = partial(progress.advance, task)
        kv_bytes, alone, together = measure_passes(options.model, options.rounds, advance)
        console.print(steps_table(alone, together))
        progress.update(task, description="batching")
        llm = LLM(options.model, tokenize=False, device="cpu", enable_prefix_caching=False, max_num_seqs=WIDTH)
        console.print(kv_table(llm, kv_bytes))
        console.print(batching_table(llm, options.requests, options.rounds, advance))


def measure_passes(model: str, rounds: int, advance: Callable[[], None]) -> tuple[float, Step, Step]:
    """Bytes of KV cache per token; the passes of one request, and of `WIDTH` together."""
    engine = MiniVLLMEngine(model, device="cpu", enable_prefix_caching=False, max_num_seqs=WIDTH)
    measure_steps(engine, 1)  # warms up
    kv_bytes = measure_kv_bytes(engine)
    return kv_bytes, median_steps(engine, 1, rounds, advance), median_steps(engine, WIDTH, rounds, advance)


def median_steps(engine: MiniVLLMEngine, num_requests: int, rounds: int, advance: Callable[[], None]) -> Step:
    """`measure_steps`, several times."""
    results = []
    for _ in range(rounds):
        results.append(measure_steps(engine, num_requests))
        advance()
    return Step(*map(statistics.median, zip(*results, strict=True)))


def measure_steps(engine: MiniVLLMEngine, num_requests: int) -> Step:
    """Prefill `num_requests` prompts one after the other, then decode them together."""
    req_ids = [_register(engine) for _ in range(num_requests)]
    start = time.perf_counter()
    for req_id in req_ids:
        engine.prefill([req_id])
    prefilled = time.perf_counter()
    times = []
    for _ in range(NUM_DECODE_STEPS):
        begin = time.perf_counter()
        engine.decode_step(req_ids)
        times.append(time.perf_counter() - begin)
    num_tokens = sum(len(engine.tokens[req_id]) - NUM_DECODE_STEPS for req_id in req_ids)
    for req_id in req_ids:
        engine.free(req_id)
    return Step((prefilled - start) / num_tokens, statistics.median(times))


def measure_kv_bytes(engine: MiniVLLMEngine) -> float:
    """Bytes per token of the K and V that one request holds in the pool."""
    req_id = _register(engine)
    engine.prefill([req_id])
    num_bytes = sum(tensor.nbytes for layer in engine.slice_kv(req_id) for tensor in layer)
    num_tokens = len(engine.tokens[req_id]) - 1  # the first output token has not been through the model yet
    engine.free(req_id)
    return num_bytes / num_tokens


def generate_hf(model: transformers.PreTrainedModel, work: Work) -> list[list[int]]:
    """`generate()` on batches padded on the left: each runs until its longest request is done."""
    outputs = []
    for batch in work.static_batches():
        longest = max(map(len, batch.prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch.prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch.prompts])
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=max(batch.output_lens))  # type: ignore[operator]
        outputs += [row[longest : longest + n].tolist() for row, n in zip(tokens, batch.output_lens, strict=True)]
    return outputs


def generate_static(llm: LLM, work: Work) -> list[list[int]]:
    """Our engine, but a batch begins only when the one before has ended."""
    return list(itertools.chain.from_iterable(generate(llm, batch) for batch in work.static_batches()))


def generate(llm: LLM, work: Work) -> list[list[int]]:
    """Our engine: whoever ends makes room for the next."""
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in work.output_lens]
    return [completion.token_ids for completion in llm.generate(work.prompts, params, use_progress_bar=False)]


WAYS = ("static, HF generate()", "static, this engine", "continuous, this engine")


def batching_table(llm: LLM, num_requests: int, rounds: int, advance: Callable[[], None]) -> Table:
    """The same work in every way, interleaved, so that a noisy moment hits all of them."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(_directory(llm), dtype=torch.float32)
    hf.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)  # no EOS: lengths are given
    work = _mixed_work(num_requests, llm.engine.model.vocab_size)
    generators: tuple[Generate, ...] = (partial(generate_hf, hf), partial(generate_static, llm), partial(generate, llm))
    seconds: list[list[float]] = [[] for _ in WAYS]
    outputs: list[list[list[int]]] = [[] for _ in WAYS]
    num_steps = [0 for _ in WAYS]
    for _ in range(rounds):
        for index, run in enumerate(generators):
            start, num_before = time.perf_counter(), _num_decode_steps(llm)
            outputs[index] = run(work)
            seconds[index].append(time.perf_counter() - start)
            num_steps[index] = _num_decode_steps(llm) - num_before
            advance()
    num_steps[0] = sum(max(batch.output_lens) - 1 for batch in work.static_batches())
    num_tokens = sum(work.output_lens)
    table = Table(
        "batching", "tokens/s", "decode steps", "requests per step", "answers equal to HF's",
        title=f"{num_requests} requests of {OUTPUT_LENS[0]} to {OUTPUT_LENS[1]} output tokens, {num_tokens} in all",
    )  # fmt: skip
    for way, times, answers, steps in zip(WAYS, seconds, outputs, num_steps, strict=True):
        equal = sum(a == b for a, b in zip(answers, outputs[0], strict=True))
        rate, width = num_tokens / statistics.median(times), (num_tokens - num_requests) / steps
        table.add_row(way, f"{rate:.1f}", str(steps), f"{width:.1f}", f"{equal} of {num_requests}")
    return table


def steps_table(alone: Step, together: Step) -> Table:
    """Prefill against decode."""
    table = Table("pass", "ms", "tokens", "ms per token", title="prefill and decode")
    prefill, num_tokens = alone.prefill_per_token * 1000, PREFILL_WORDS
    table.add_row("prefill, 1 prompt", f"{prefill * num_tokens:.0f}", str(num_tokens), f"{prefill:.2f}")
    for step, width in ((alone, 1), (together, WIDTH)):
        ms = step.decode * 1000
        table.add_row(f"decode, {width} requests", f"{ms:.1f}", str(width), f"{ms / width:.2f}")
    return table


def kv_table(llm: LLM, measured: float) -> Table:
    """KV cache against weights."""
    config = transformers.AutoConfig.from_pretrained(_directory(llm))
    heads, head_dim = config.num_key_value_heads, config.head_dim
    computed = config.num_hidden_layers * 2 * heads * head_dim * 4
    weights = llm.engine.model.weight_bytes
    table = Table("KV cache", "value", title="KV cache and weights")
    table.add_row(
        "layers * (K and V) * KV heads * head size * bytes",
        f"{config.num_hidden_layers} * 2 * {heads} * {head_dim} * 4",
    )
    table.add_row("bytes per token, from the configuration", f"{computed:,}")
    table.add_row("bytes per token, of a request in the pool", f"{measured:,.0f}")
    table.add_row("weights", f"{weights / 1e6:.0f} MB")
    table.add_row("tokens whose K/V is as large as the weights", f"{weights // computed:,}")
    return table


def _directory(llm: LLM) -> Path:
    return resolve_model(ModelConfig(model=llm.engine.config.model))


def _register(engine: MiniVLLMEngine) -> int:
    prompt = " ".join(random.choices(WORDS, k=PREFILL_WORDS))
    return engine.register_request(prompt, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None))


def _num_decode_steps(llm: LLM) -> int:
    return sum(llm.engine.stats().histograms["decode_batch_size"].counts)


def _mixed_work(num_requests: int, vocab_size: int) -> Work:
    source = random.Random(0)
    prompts = [
        [source.randrange(1000, vocab_size) for _ in range(source.randint(*PROMPT_LENS))] for _ in range(num_requests)
    ]
    return Work(prompts, [source.randint(*OUTPUT_LENS) for _ in prompts])


def _machine() -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{torch.get_num_threads()} threads on {_cpu_name()}, {versions}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/numbers", description=__doc__)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="directory or hub id [%(default)s]")
    parser.add_argument("--requests", type=int, default=32, help="requests of the batching measurement [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each measurement [%(default)s]")
    return parser.parse_args()


if __name__ == "__main__":
    main()
