"""numba, told before it is imported where to keep what it compiles and how to run threads."""

import os
from typing import Any

from minivllm.cache import cache_dir

os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "numba"))
os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")  # its own pool wakes up 20 times slower

import numba
import numba.extending
from numba import njit, prange

intrinsic: Any = numba.extending.intrinsic  # what it decorates is called with other arguments than it has

__all__ = ["intrinsic", "njit", "prange", "set_num_threads"]


def set_num_threads(count: int) -> None:
    """Share compiled loops among `count` threads, or as many as numba started with."""
    numba.set_num_threads(max(1, min(count, numba.config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
