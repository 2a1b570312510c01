"""How many frontend processes a server gets when nobody says."""

import os
from collections.abc import Mapping
from pathlib import Path

from minivllm.config import EngineConfig

_CORES_PER_FRONTEND = 4
_MAX_FRONTENDS = 4
_NVIDIA_DRIVER = Path("/dev/nvidiactl")


def default_api_server_count(config: EngineConfig) -> int:
    """A frontend for every four cores, up to four; one where the engine itself computes on the cores.

    One frontend keeps up with some 60,000 tokens/s (docs/frontend-profile.md), more than a GPU brings. The others are
    there so that tokenizing and starting requests holds up fewer streams. The engine core needs a core for itself.
    """
    if not uses_gpu(config, os.environ):
        return 1
    return max(1, min(_MAX_FRONTENDS, _num_cores() // _CORES_PER_FRONTEND))


def uses_gpu(config: EngineConfig, environ: Mapping[str, str], driver: Path = _NVIDIA_DRIVER) -> bool:
    """Whether the engine core will find a GPU, as far as one can tell without loading torch."""
    if config.device != "auto":
        return config.device == "cuda"
    return environ.get("CUDA_VISIBLE_DEVICES", "0") not in {"", "-1"} and driver.exists()


def _num_cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
