"""A standard decoder's pass on a CPU without its model code: a loop over the layers, compiled steps, no small tensors.

    norm ─▶ q/k/v ─▶ rotate, store ─▶ attend ─▶ output ─▶ add, norm ─▶ gate/up ─▶ gate ─▶ down ─▶ add, (next) norm

The model's own code calls some 40 small torch operations in each layer, and one core waits meanwhile.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine_core.attention.cpu_attention import CpuAttention
from engine_core.attention.cpu_decode import CpuDecode
from engine_core.attention.cpu_prefill import CpuPrefill
from engine_core.attention.paged import Floats
from engine_core.attention.torch_backend import PrefillSpan
from engine_core.cpu_layers import add_and_normalize, gate, rotate_and_store
from engine_core.kv_pool import KVPool
from engine_core.model_loader import LoadedModel
from engine_core.standard_decoder import Norm, StandardDecoder, StandardLayer, recognize

_TOLERANCE = 1e-3  # of the largest logit: sums are made in another order, no more
_NUM_PROBED = 8  # tokens of a prefill pass; one more decodes


@dataclass(frozen=True, slots=True)
class _Caches:
    """One layer's share of the KV pool."""

    key: Floats  # [num_blocks, block_size, num_kv_heads, head_dim]
    value: Floats
    key_slots: Floats  # [num_slots, num_kv_heads, head_dim], the same memory
    value_slots: Floats

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> "_Caches":
        return cls(key.numpy(), value.numpy(), key.flatten(0, 1).numpy(), value.flatten(0, 1).numpy())


class _Pass:
    """Working memory of a pass: every layer writes where the one before did."""

    def __init__(self, layer: StandardLayer, hidden: Floats, attended: Floats) -> None:
        num_tokens = len(hidden)
        self.hidden = hidden  # [num_tokens, hidden_size]
        self.attended = attended  # [num_tokens, num_heads, head_dim]
        self.normed = np.empty_like(hidden)
        self.qkv = layer.qkv.new_output(num_tokens)
        self.gate_up = layer.gate_up.new_output(num_tokens)
        self.gated = np.empty((num_tokens, layer.down.in_features), np.float32)
        self.update = layer.output.new_output(num_tokens)  # what is to be added to `hidden`
        self.update[:] = 0

    def of_rows(self, layer: StandardLayer, rows: npt.NDArray[np.int64]) -> "_Pass":
        """The same for the tokens `rows` alone, when nothing waits to be added."""
        return _Pass(layer, self.hidden[rows], self.attended[rows])

    def normalize(self, norm: Norm) -> Floats:
        """Add what is to be added, and return the norm of the sum."""
        add_and_normalize(self.hidden, self.update, norm.weight, norm.epsilon, self.normed)
        return self.normed


class CpuDecoder:
    """Runs passes over the K/V caches of one pool."""

    def __init__(self, parts: StandardDecoder, num_heads: int, pool: KVPool) -> None:
        self._parts = parts
        self._num_heads = num_heads
        self._head_dim = pool.layout.head_dim
        self._caches = [_Caches.of(*caches) for caches in zip(pool.key_caches, pool.value_caches, strict=True)]

    def logits(
        self, input_ids: Tensor, positions: Tensor, attention: CpuAttention, logits_index: Tensor | None = None
    ) -> Tensor:
        """Logits [num_logits, vocab_size] of packed tokens [num_tokens], at `logits_index` (None: of all)."""
        parts, layers = self._parts, self._parts.layers
        hidden = parts.embed(input_ids)
        cos, sin = (angles[0].numpy() for angles in parts.angles(hidden, positions[None]))  # [num_tokens, head_dim]
        attended = np.empty((len(hidden), self._num_heads, self._head_dim), np.float32)
        work = _Pass(layers[0], hidden.numpy(), attended)
        for layer, caches in zip(layers, self._caches, strict=True):
            self._mix(layer, work, caches, cos, sin, attention)
            if layer is layers[-1] and logits_index is not None:  # from here on the others do not matter
                work = work.of_rows(layer, logits_index.numpy())
            self._finish(layer, work)
        last = work.normalize(parts.norm)
        logits = parts.head.new_output(len(last))
        parts.head.multiply(last, logits)
        return torch.from_numpy(logits)[:, : parts.head.out_features]

    def _mix(
        self, layer: StandardLayer, work: _Pass, caches: _Caches, cos: Floats, sin: Floats, attention: CpuAttention
    ) -> None:
        """What a token gets from those before it."""
        layer.qkv.multiply(work.normalize(layer.input_norm), work.qkv)
        rotate_and_store(
            work.qkv, self._num_heads, cos, sin, layer.query_norm.weight, layer.key_norm.weight,
            layer.query_norm.epsilon, caches.key_slots, caches.value_slots, attention.slot_mapping.numpy(),
        )  # fmt: skip
        attention.attend_to_stored(work.qkv, caches.key, caches.value, layer.scoring, work.attended)

    @staticmethod
    def _finish(layer: StandardLayer, work: _Pass) -> None:
        """What happens to each token alone."""
        layer.output.multiply(work.attended.reshape(len(work.attended), -1), work.update)
        layer.gate_up.multiply(work.normalize(layer.mlp_norm), work.gate_up)
        gate(work.gate_up, work.gated)
        layer.down.multiply(work.gated, work.update)


@torch.inference_mode()
def find_cpu_decoder(loaded: LoadedModel, pool: KVPool) -> CpuDecoder | None:
    """For a model that is a standard decoder and whose own code gives the same logits, else None.

    Before any request: blocks of the pool are used to find out.
    """
    parts = recognize(loaded.model, loaded.layers)
    if parts is None:
        return None
    num_tokens = min(_NUM_PROBED, (pool.num_blocks + 1) * pool.block_size - 1)
    positions, table = torch.arange(num_tokens + 1), torch.arange(pool.num_blocks + 1)
    ids = positions * 37 % loaded.vocab_size
    if parts.angles(pool.key_caches[0], positions[None])[0].shape[-1] != pool.layout.head_dim:
        return None  # only a part of each head is turned
    decoder = CpuDecoder(parts, loaded.num_heads, pool)
    prompt, last = slice(num_tokens), slice(num_tokens, None)
    prefill = CpuPrefill(positions[prompt], [PrefillSpan(0, num_tokens, 0, num_tokens, table)])
    decode = CpuDecode(positions[last], table[None], [num_tokens + 1])
    for part, attention in ((prompt, prefill), (last, decode)):
        logits = decoder.logits(ids[part], positions[part], attention)
        pool.context.metadata = attention
        own = loaded.model(input_ids=ids[None, part], position_ids=positions[None, part], use_cache=False).logits[0]
        if not (logits - own).abs().max() <= _TOLERANCE * own.abs().max():
            return None
    return decoder
