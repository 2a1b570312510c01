"""The attention function that Hugging Face layers call: it hands their tensors to the backend of the current pass.

model code ─▶ paged_attention(module, q, k, v) ─▶ metadata of the pass .attend(…)   torch or Triton, prefill or decode
              in compiled layers through one opaque operator, so that one compilation serves every kind of pass
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

ATTENTION_NAME = "minivllm_paged"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores are made: scaling * q·k, soft-capped, over the last `window` keys (None: not capped, all keys)."""

    scaling: float
    window: int | None = None
    softcap: float | None = None


class AttentionMetadata(Protocol):
    """Where the tokens of one forward pass live, and how to attend to them. Built once per pass."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, scoring: Scoring
    ) -> Tensor:
        """Store key/value [num_tokens, num_kv_heads, head_dim] and return the output for query, both
        [num_tokens, num_heads, head_dim]. Caches are [num_blocks, block_size, num_kv_heads, head_dim]."""
        ...


class ForwardContext:
    """Hands the metadata of the current pass to the layers: the one thing that model code does not pass through."""

    metadata: AttentionMetadata

    def __init__(self) -> None:
        self.number = next(_numbers)
        _contexts[self.number] = self


# Operators take tensors and numbers only, so compiled layers name their context by number: the same in every process,
# because it is a constant of the compiled code, and another constant would not be found in the compiler's cache.
_numbers = count()
_contexts: MutableMapping[int, ForwardContext] = WeakValueDictionary()


class PagedLayer(nn.Module):
    """One attention layer's share of the KV pool, attached to its attention module as `paged_layer`.

    A module with buffers, because `torch.compile` then takes the caches as inputs and shares one compilation among
    all layers.
    """

    key_cache: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: Tensor

    def __init__(self, key_cache: Tensor, value_cache: Tensor, context: ForwardContext) -> None:
        super().__init__()
        self.register_buffer("key_cache", key_cache, persistent=False)
        self.register_buffer("value_cache", value_cache, persistent=False)
        self.context_number = context.number


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,  # what else a model passes was checked by the probe when it was loaded
) -> tuple[Tensor, None]:
    """Output [1, num_tokens, num_heads, head_dim]."""
    layer: PagedLayer = module.paged_layer  # type: ignore[assignment]
    attend = torch.ops.minivllm.paged_attention if torch.compiler.is_compiling() else _attend
    output = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layer.key_cache,
        layer.value_cache,
        layer.context_number,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window or 0,
        softcap or 0.0,
    )
    return output[None], None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    context_number: int,
    scaling: float,
    window: int,
    softcap: float,
) -> Tensor:
    scoring = Scoring(scaling, window or None, softcap or None)
    return _contexts[context_number].metadata.attend(query, key, value, key_cache, value_cache, scoring)


# For compiled code only: calling it costs as much as a small batch's attention.
_paged_attention = torch.library.custom_op(
    "minivllm::paged_attention", _attend, mutates_args=("key_cache", "value_cache")
)


@_paged_attention.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)
