"""The memory of the KV cache: one tensor, cut into layers and blocks, and how large it may be.

[num_layers, K or V, num_blocks, block_size, num_kv_heads, head_dim]
"""

import math
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor

from engine_core.attention.paged import ForwardContext, PagedLayer
from engine_core.attention.probe import AttentionLayer
from minivllm.config import EngineConfig
from minivllm.errors import StartupError

DEFAULT_CPU_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of one token's K/V in all layers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KVPool:
    """K/V of all requests in `num_blocks` blocks. `attach` gives every attention module its layer.

    Keys and values of each layer are allocations of their own: a compiled layer takes them as inputs, and inputs that
    share memory could not be told apart.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.scratch_block = num_blocks  # one block more: padded tokens of captured graphs write there
        self.block_size = block_size
        shape = (num_blocks + 1, block_size, layout.num_kv_heads, layout.head_dim)
        caches = [_zeros(shape, layout.dtype, device) for _ in range(2 * layout.num_layers)]
        self.key_caches, self.value_caches = caches[::2], caches[1::2]
        self.context = ForwardContext()

    def attach(self, layers: list[AttentionLayer]) -> None:
        """Set `paged_layer` on each attention module, in the order the layers run."""
        for layer, key_cache, value_cache in zip(layers, self.key_caches, self.value_caches, strict=True):
            layer.module.paged_layer = PagedLayer(key_cache, value_cache, self.context)

    def read(self, block_table: list[int], num_tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Per layer, copies of a request's K and V [1, num_kv_heads, num_tokens, head_dim], as Hugging Face has."""
        blocks = torch.tensor(block_table, dtype=torch.int64, device=self.key_caches[0].device)

        def tokens(cache: Tensor) -> Tensor:
            return cache[blocks].flatten(0, 1)[:num_tokens].transpose(0, 1)[None]

        return [(tokens(key), tokens(value)) for key, value in zip(self.key_caches, self.value_caches, strict=True)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not empty: padded positions are read (and masked), and 0 * NaN of old memory would still be NaN.

    On a CPU numpy leaves them to the operating system, which gives memory only to blocks that are used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def choose_num_blocks(config: EngineConfig, layout: KVLayout, device: torch.device, activation_bytes: int = 0) -> int:
    """Blocks that fit: by override, by bytes, or by what the device has left. Raises `StartupError` when none do."""
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    available = config.kv_cache_memory_bytes or _available_bytes(config, device, activation_bytes)
    num_blocks = available // (layout.bytes_per_token * config.block_size)
    if num_blocks < 1:
        raise StartupError(
            f"no memory left for the KV cache: {available / 2**20:.0f} MiB for blocks of "
            f"{layout.bytes_per_token * config.block_size / 2**20:.2f} MiB; {_advice(config, activation_bytes)}"
        )
    return int(num_blocks)


def _advice(config: EngineConfig, activation_bytes: int) -> str:
    """What to change when nothing is left, with what it is set to now."""
    if config.kv_cache_memory_bytes is not None:
        return f"raise --kv-cache-memory-bytes ({config.kv_cache_memory_bytes}) or lower --block-size"
    return (
        f"raise --gpu-memory-utilization ({config.gpu_memory_utilization:g}), lower --max-num-batched-tokens or "
        f"--max-num-seqs ({config.max_num_seqs}), for whose passes {activation_bytes / 2**20:.0f} MiB are kept, or "
        "choose a smaller model"
    )


def _available_bytes(config: EngineConfig, device: torch.device, activation_bytes: int) -> int:
    if device.type != "cuda":
        return min(DEFAULT_CPU_BYTES, int(psutil.virtual_memory().available * 0.8))
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(total * config.gpu_memory_utilization) - (total - free) - activation_bytes
