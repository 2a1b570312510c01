"""Lab kv-memory: bytes per token, from the configuration and in the pool, and how requests outgrow the weights."""

from functools import partial
from typing import TYPE_CHECKING

from transformers import PretrainedConfig

from engine_core.block_pool import BlockPool
from engine_core.engine import EngineCore
from engine_core.kv_cache_manager import KVCacheManager
from engine_core.kv_pool import KVPool
from engine_core.model_loader import read_config
from minivllm.errors import StartupError
from minivllm.labs.findings import Findings, Rows
from minivllm.labs.workbench import Workbench
from minivllm.plots import COLORS, new_figure
from minivllm.sampling_params import SamplingParams
from minivllm.units import MEMORY, fitting, number, quantity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BROKEN_BLOCK_SIZE = 512
Growth = list[tuple[int, int]]  # (tokens of live requests, bytes of the blocks they hold), after each request


def run(bench: Workbench) -> Findings:
    """Fill the cache request by request, with small blocks and with huge ones."""
    num_requests, prompt_len = bench.pick((16, 96), (4, 24))
    bench.watch.plan(2 * num_requests)
    engine = bench.engine()
    config = read_config(bench.directory)
    growth = grow(bench, engine, num_requests, prompt_len)
    per_token = block_bytes(engine) / engine.config.block_size
    weights = engine.model.weight_bytes
    computed = bytes_per_token(config, engine.model.layout.dtype.itemsize)
    size = min(_BROKEN_BLOCK_SIZE, engine.max_model_len)
    huge = bench.engine(block_size=size, enforce_eager=True)
    broken = grow(bench, huge, num_requests, prompt_len)
    used, wasted = growth[-1][1], broken[-1][1]
    rows = [
        ("bytes per token, from the configuration", f"{computed:,}"),
        ("bytes per token, of the pool's tensors", f"{per_token:,.0f}"),
        ("weights", quantity(weights, MEMORY)),
        (f"{num_requests} requests of {prompt_len} tokens", quantity(used, MEMORY)),
        ("one request of 1,024 tokens", quantity(1024 * per_token, MEMORY)),
        ("tokens whose K/V weigh as much as the weights", f"{int(weights / per_token):,}"),
    ]
    return Findings(
        number=f"A token costs {per_token:,.0f} bytes of KV cache; {int(weights / per_token):,} tokens weigh as "
        f"much as the model ({quantity(weights, MEMORY)}).",
        broken=f"with blocks of {size} tokens the same {num_requests} requests hold {quantity(wasted, MEMORY)} instead "
        f"of {quantity(used, MEMORY)}, {number(wasted / used)} times as much: each holds whole blocks.",
        tables=[Rows("Memory", ("what", "value"), rows)],
        figure=_draw(growth, broken, size, weights, per_token),
        code=(KVPool, KVCacheManager.allocate_prefill, KVCacheManager.append_slot, BlockPool.allocate),
    )


def bytes_per_token(config: PretrainedConfig, itemsize: int) -> int:
    """Layers × (K and V) × KV heads × head size × bytes per number."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(text.num_hidden_layers * 2 * heads * head_dim * itemsize)


def block_bytes(engine: EngineCore) -> float:
    """Bytes of one block in all layers, of the tensors as they are."""
    pool = engine.kv_pool
    return float(sum(cache[0].nbytes for cache in (*pool.key_caches, *pool.value_caches)))


def grow(bench: Workbench, engine: EngineCore, num_requests: int, prompt_len: int) -> Growth:
    """Prefill one request after the other and keep all alive."""
    growth: Growth = []
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=2 * num_requests + 2)
    names = [f"kv-{index}" for index in range(num_requests)]
    for name in names:
        prompt = bench.source.choices(range(engine.model.vocab_size), k=prompt_len)
        engine.add_request(name, prompt, params)
        bench.watch.run(f"request {name}", partial(_prefill, engine, len(growth) + 1))
        num_tokens = sum(request.num_computed_tokens for request in engine.scheduler.decode_queue)
        growth.append((num_tokens, round(engine.kv.pool.num_used * block_bytes(engine))))
    engine.abort(names)
    engine.step()
    engine.check_integrity()
    return growth


def _prefill(engine: EngineCore, num_decoding: int) -> None:
    while len(engine.scheduler.decode_queue) < num_decoding:
        if not engine.scheduler.prefill_queue:
            raise StartupError(f"the KV cache does not hold {num_decoding} requests at once")
        engine.step()


def _draw(growth: Growth, broken: Growth, size: int, weights: int, per_token: float) -> "Figure":
    figure, (top, bottom) = new_figure(2, height=2.9)
    unit, whole = fitting(MEMORY, [growth[-1][1], broken[-1][1]]), fitting(MEMORY, [2 * weights])
    for points, color, label in ((growth, COLORS[0], "small blocks"), (broken, COLORS[1], f"blocks of {size} tokens")):
        tokens, held = [tokens for tokens, _ in points], [held / unit.size for _, held in points]
        top.plot(tokens, held, "o-", color=color, label=label, markersize=3)
    last = growth[-1][0]
    top.plot([0, last], [0, last * per_token / unit.size], ":", color="black", label="tokens × bytes per token")
    top.set(
        xlabel="tokens of live requests", ylabel=f"{unit.name} of blocks held", title="Measured while requests come"
    )
    crossing = weights / per_token
    bottom.plot([0, 2 * crossing], [0, 2 * weights / whole.size], color=COLORS[0], label="KV cache")
    bottom.axhline(weights / whole.size, color=COLORS[2], label="weights")
    bottom.axvline(crossing, color="black", linewidth=0.7, linestyle=":")
    bottom.set(
        xlabel="tokens in the cache", ylabel=whole.name, title=f"As heavy as the model at {crossing:,.0f} tokens"
    )
    for axes in (top, bottom):
        axes.legend(frameon=False)
    return figure
