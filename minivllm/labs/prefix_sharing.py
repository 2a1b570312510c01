"""Lab prefix-sharing: hit rate, TTFT and memory of shared prompts and growing chats; and what eviction costs."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from engine_core.block_pool import BlockPool
from engine_core.engine import EngineCore
from engine_core.kv_cache_manager import KVCacheManager
from minivllm.labs.findings import Findings, Rows
from minivllm.labs.workbench import Workbench
from minivllm.plots import COLORS, new_figure
from minivllm.sampling_params import SamplingParams
from minivllm.simulate.drive import WallClock
from minivllm.units import TIME, duration, fitting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUM_IN_TURN = 4

Conversation = list[list[int]]  # prompts that come one after the other


class Shared(NamedTuple):
    """One workload on one engine."""

    ttft: float  # seconds, mean of all but the first prompt
    hit_rate: float  # of prompt tokens
    num_blocks: int  # that hold content at the end


def run(bench: Workbench) -> Findings:
    """Each workload with the cache, without, and in a pool that holds little more than one request."""
    workloads = make_workloads(bench)
    longest = max(len(prompt) for prompts in workloads.values() for prompt in prompts)
    engines = {
        "cache": bench.engine(),
        "no cache": bench.engine(enable_prefix_caching=False),
        "small pool": bench.engine(num_gpu_blocks_override=-(-longest // 16) + 2),
    }
    bench.watch.plan(len(workloads) * (1 + len(engines)))
    found: dict[tuple[str, str], Shared] = {}
    for prompts in workloads.values():
        bench.watch.run("warm-up", partial(serve, engines["cache"], prompts))  # every shape of a pass once
    for where, engine in engines.items():
        for name, prompts in workloads.items():
            found[name, where] = bench.watch.run(f"{name}, {where}", partial(serve, engine, prompts))
        engine.check_integrity()
    name = "system prompt"
    hit, miss = found[name, "cache"], found[name, "no cache"]
    return Findings(
        number=f"With a shared system prompt {100 * hit.hit_rate:.0f} % of the prompt tokens are found, and the "
        f"first token comes after {duration(hit.ttft)} instead of {duration(miss.ttft)}.",
        broken=f"without the cache every prompt is computed whole; in a pool too small for four prompts in turn "
        f"{100 * found['in turn', 'small pool'].hit_rate:.0f} % are found instead of "
        f"{100 * found['in turn', 'cache'].hit_rate:.0f} %: what was evicted is computed again.",
        tables=[_table(workloads, engines, found)],
        figure=_draw(list(workloads), list(engines), found),
        code=(KVCacheManager._matching_blocks, KVCacheManager.commit, BlockPool.lookup, BlockPool.allocate),  # noqa: SLF001
    )


def make_workloads(bench: Workbench) -> dict[str, Conversation]:
    """A shared system prompt; few-shot examples before short questions; one chat; four system prompts in turn."""
    system, own, count = bench.pick((128, 32, 5), (64, 8, 2), gpu=(3072, 32, 5))

    def tokens(number: int) -> list[int]:
        return [bench.source.randrange(3, 300) for _ in range(number)]

    shared, examples = tokens(system), tokens(2 * system)
    in_turn = [tokens(system) for _ in range(_NUM_IN_TURN)]
    turns = [tokens(own) for _ in range(count)]
    return {
        "system prompt": [shared + tokens(own) for _ in range(count)],
        "few-shot": [examples + tokens(own // 2) for _ in range(count)],
        "one chat": [[token for turn in turns[: index + 1] for token in turn] for index in range(count)],
        "in turn": [prompt + tokens(own) for _ in range(2) for prompt in in_turn],
        "nothing shared": [tokens(system + own) for _ in range(count)],
    }


def serve(engine: EngineCore, prompts: Conversation) -> Shared:
    """The prompts one after the other, one token each, on a cache that holds nothing at first."""
    engine.kv.pool.reset_prefix_cache()
    queries, hits = engine.kv.num_prefix_queries, engine.kv.num_prefix_hits
    clock, times = WallClock(), []
    for index, prompt in enumerate(prompts):
        start = clock()
        engine.add_request(f"shared-{index}", prompt, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1))
        while engine.has_work:
            engine.step()
        times.append(clock() - start)
    later = times[1:] or times
    found = (engine.kv.num_prefix_hits - hits) / max(1, engine.kv.num_prefix_queries - queries)
    return Shared(sum(later) / len(later), found, engine.kv.pool.num_cached)


def _table(
    workloads: dict[str, Conversation], engines: dict[str, EngineCore], found: dict[tuple[str, str], Shared]
) -> Rows:
    rows = []
    for name, prompts in workloads.items():
        cells = [f"{len(prompts)} × {len(prompts[-1])}"]
        for where in engines:
            shared = found[name, where]
            cells.append(f"{duration(shared.ttft)}, {100 * shared.hit_rate:.0f} %, {shared.num_blocks}")
        rows.append((name, *cells))
    return Rows("TTFT, hit rate, blocks that hold content in the end", ("workload", "prompts", *engines), rows)


def _draw(names: Sequence[str], wheres: Sequence[str], found: dict[tuple[str, str], Shared]) -> "Figure":
    figure, (axes,) = new_figure()
    unit = fitting(TIME, [shared.ttft for shared in found.values()])
    for index, (where, color) in enumerate(zip(wheres, COLORS, strict=False)):
        places = [place + 0.27 * (index - 1) for place in range(len(names))]
        axes.bar(places, [found[name, where].ttft / unit.size for name in names], 0.25, color=color, label=where)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel=f"mean TTFT after the first prompt, {unit.name}", title="What is found need not be computed")
    axes.legend(frameon=False)
    return figure
