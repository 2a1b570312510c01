"""Loads the model of the labs once: engines that differ on the host alone share its weights and its KV pool.

loaded   [ model │ KV pool of 1,456 blocks ]
engine   max_num_seqs 1, 30 of the blocks    ─ passes of the same runner, one engine at a time
"""

from copy import copy
from dataclasses import replace
from pathlib import Path

from engine_core.device import Device, Report, load_device
from minivllm.config import EngineConfig
from minivllm.errors import StartupError

_ON_THE_HOST = {"max_num_seqs", "max_num_batched_tokens", "num_gpu_blocks_override", "enable_prefix_caching"}


class Devices:
    """Keeps what was loaded. Its `load` takes the place of `load_device`."""

    def __init__(self) -> None:
        self._loaded: dict[EngineConfig, Device] = {}

    def load(self, config: EngineConfig, directory: Path, report: Report) -> Device:
        """A device for `config`. An engine that got the same one before must be idle. Raises `StartupError`."""
        wanted = EngineConfig(**config.model_dump(exclude=_ON_THE_HOST, exclude_unset=True))
        device = self._loaded.get(wanted)
        if device is None:
            device = self._loaded[wanted] = load_device(wanted, directory, report)
        num_blocks = config.num_gpu_blocks_override or device.kv_pool.num_blocks
        if num_blocks > device.kv_pool.num_blocks or config.max_num_seqs > wanted.max_num_seqs:
            raise StartupError(
                f"{num_blocks} blocks for {config.max_num_seqs} requests are more than the {device.kv_pool.num_blocks} "
                f"blocks for {wanted.max_num_seqs} requests that were loaded"
            )
        return limited(device, num_blocks, config.max_num_batched_tokens)


def limited(device: Device, num_blocks: int, max_num_batched_tokens: int | None) -> Device:
    """`device` for an engine that uses the first `num_blocks` of its blocks, in passes of another size."""
    pool = copy(device.kv_pool)
    pool.num_blocks = num_blocks
    return replace(
        device,
        kv_pool=pool,
        max_model_len=min(device.max_model_len, num_blocks * pool.block_size),
        max_num_batched_tokens=max_num_batched_tokens or device.max_num_batched_tokens,
    )
