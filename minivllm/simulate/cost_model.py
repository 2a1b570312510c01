"""How long a pass takes: what `minivllm bench fit` measures and the simulated device charges.

decode    base(rows) + per_context_token × tokens in the KV cache that are read
prefill   base(tokens) + per_pair × (query, key) pairs of attention + per_row × (prompts in the pass - 1)

`base` is a table, interpolated linearly and continued with the slope of its last piece: neither kind of pass is linear,
because a batch shares the weights that it reads.
"""

from bisect import bisect_left
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from minivllm.errors import StartupError

if TYPE_CHECKING:
    from engine_core.scheduler import Batch

PACKAGED = Path(__file__).with_name("cost_models")
DEFAULT_COST_MODEL = "smollm2-135m-cpu"


class Curve(Struct, frozen=True, dict=True, forbid_unknown_fields=True):
    """Points (sizes[i], seconds[i]), sizes ascending; a straight line between two, and beyond the last two."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.seconds):
            raise ValueError(f"a curve needs as many seconds as sizes, got {len(self.seconds)} and {len(self.sizes)}")
        if list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise ValueError(f"the sizes of a curve must ascend from 1 or more, got {self.sizes}")
        if min(self.seconds) < 0:
            raise ValueError(f"the seconds of a curve must not be negative, got {self.seconds}")

    def __call__(self, size: int) -> float:
        """Seconds for `size`."""
        known = self._known.get(size)
        if known is None:
            known = self._known[size] = max(
                0.0, sum(w * y for w, y in zip(self.weights(size), self.seconds, strict=True))
            )
        return known

    def weights(self, size: int) -> list[float]:
        """How much each point counts at `size`: the curve is linear in its seconds, so that it can be fitted."""
        weights = [0.0] * len(self.sizes)
        if len(self.sizes) == 1 or size <= self.sizes[0]:
            weights[0] = 1.0
            return weights
        right = min(bisect_left(self.sizes, size), len(self.sizes) - 1)
        low, high = self.sizes[right - 1], self.sizes[right]
        weights[right] = (size - low) / (high - low)
        weights[right - 1] = 1.0 - weights[right]
        return weights

    @cached_property
    def _known(self) -> dict[int, float]:
        return {}


class CostModel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds per pass of one model on one machine, and the sizes of the engine that was measured."""

    description: str  # model, machine, versions, date
    decode: Curve  # over requests in the pass
    decode_per_context_token: float
    prefill: Curve  # over tokens in the pass
    prefill_per_pair: float
    prefill_per_row: float
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_batched_tokens: int
    depth: int = 0  # passes in flight between two steps
    mean_error: float = 0.0  # of the fit: mean of |fitted - measured| / measured

    def __post_init__(self) -> None:
        if min(self.decode_per_context_token, self.prefill_per_pair, self.prefill_per_row) < 0:
            raise ValueError("costs must not be negative")
        if max(*self.decode.seconds, self.decode_per_context_token) == 0 or max(self.prefill.seconds) == 0:
            raise ValueError("a pass must take time, but decode or prefill costs nothing")

    def seconds(self, batch: "Batch") -> float:
        """Of one pass."""
        if batch.kind == "decode":
            rows = len(batch.requests)
            return self.decode(rows) + self.decode_per_context_token * (sum(batch.starts) + rows)
        pairs = sum(causal_pairs(start, count) for start, count in zip(batch.starts, batch.counts, strict=True))
        rows = len(batch.requests)
        return self.prefill(batch.num_tokens) + self.prefill_per_pair * pairs + self.prefill_per_row * (rows - 1)

    def as_json(self) -> str:
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()


def causal_pairs(start: int, count: int) -> int:
    """(query, key) pairs of a chunk of `count` tokens at position `start`."""
    return count * start + count * (count + 1) // 2


def load_cost_model(name_or_path: str) -> CostModel:
    """A packaged one by its name, or a file of `minivllm bench fit --json`. Raises `StartupError`."""
    packaged = PACKAGED / f"{name_or_path}.json"
    path = packaged if packaged.exists() else Path(name_or_path)
    try:
        content = msgspec.json.decode(path.read_bytes())
        return msgspec.convert(content.get("cost_model", content), CostModel)
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in PACKAGED.glob("*.json")))
        raise StartupError(f"--cost-model {name_or_path}: {error.strerror} (packaged: {known})") from error
    except (msgspec.MsgspecError, AttributeError) as error:
        raise StartupError(f"--cost-model {name_or_path} is no cost model: {error}") from error
