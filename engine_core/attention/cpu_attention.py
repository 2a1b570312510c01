"""What prefill and decode attention on a CPU have in common: called by a model's own code, or by `cpu_decoder`."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from engine_core.attention.paged import Floats, Scoring
from engine_core.attention.torch_backend import store


class CpuAttention(ABC):
    """`AttentionMetadata` for float32 on a CPU."""

    slot_mapping: Tensor  # [num_tokens]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, scoring: Scoring
    ) -> Tensor:
        """See `AttentionMetadata`."""
        store(key, value, key_cache, value_cache, self.slot_mapping)
        output = torch.empty(query.shape)
        queries = query.reshape(len(query), -1).contiguous().numpy()
        self.attend_to_stored(queries, key_cache.numpy(), value_cache.numpy(), scoring, output.numpy())
        return output

    @abstractmethod
    def attend_to_stored(
        self, qkv: Floats, key_cache: Floats, value_cache: Floats, scoring: Scoring, output: Floats
    ) -> None:
        """Fill output [num_tokens, num_heads, head_dim]; keys and values are in their slots already. qkv is
        [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim or more]."""
