"""numba, told before it is imported where to keep what it compiles and how to run threads."""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from minivllm.cache import cache_dir


def _compiled_dir() -> Path:
    """Of its own for each state of our compiled code: numba does not see when a function in another file changes."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("cpu_*.py")):
        digest.update(source.read_bytes())
    return cache_dir() / "numba" / digest.hexdigest()[:16]


os.environ.setdefault("NUMBA_CACHE_DIR", str(_compiled_dir()))
os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")  # its own pool wakes up 20 times slower

import numba
import numba.extending
from numba import get_num_threads, prange

# Divisions as in numpy: those of Python look for zeros before, which keeps LLVM from computing many at once.
njit: Any = functools.partial(numba.njit, error_model="numpy", cache=True)

# For what only compiled code calls: wrappers for Python would double the time to compile it.
inner: Any = functools.partial(njit, no_cpython_wrapper=True, no_cfunc_wrapper=True)
intrinsic: Any = numba.extending.intrinsic  # what it decorates is called with other arguments than it has

__all__ = ["get_num_threads", "inner", "intrinsic", "njit", "prange", "set_num_threads"]


def set_num_threads(count: int) -> None:
    """Share compiled loops among `count` threads, or as many as numba started with."""
    numba.set_num_threads(max(1, min(count, numba.config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
