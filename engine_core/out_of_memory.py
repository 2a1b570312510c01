"""The many ways in which a device says that its memory is exhausted, told apart from every other error.

An exception keeps its traceback, the traceback its frames, and the frames every tensor of the pass that failed: memory
can be released only once the exception is gone. So `attempt` turns it into a plain value.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from minivllm.errors import StartupError

T = TypeVar("T")

# torch has an exception for its own CUDA allocator; the CPU's, CUDA's libraries and Triton raise plain RuntimeErrors.
_MESSAGE = re.compile(
    r"DefaultCPUAllocator|bad_alloc|out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|could not create a memory (object|storage)",
    re.IGNORECASE,
)
_SIZE = re.compile(r"tried to allocate ([\d.]+ (?:[KMGT]i?B|bytes))", re.IGNORECASE)
_FREE = re.compile(r"of which ([\d.]+ [KMGT]i?B) is free", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Shortage:
    """Memory was lacking; `detail` is one line, with the bytes where the error named them."""

    detail: str


def attempt(action: Callable[[], T]) -> T | Shortage:
    """`action()`, or a `Shortage` when it ran out of memory; by then all that it held is let go. Others are raised."""
    try:
        return action()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Shortage(_describe(error))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or one that was being handled when it was raised (as at the end of a capture), says so."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and _MESSAGE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def release_cached_memory() -> None:
    """Give what torch keeps for later back to the device, once it is done with all that was launched."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@contextmanager
def explained_at_startup(what: str, advice: str) -> Iterator[None]:
    """Running out of memory inside becomes a `StartupError`: what did not fit, the numbers, and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"not enough memory for {what}: {_describe(error)}; {advice}"
    else:
        return
    raise StartupError(reason)


def _describe(error: BaseException) -> str:
    """`tried to allocate 2.00 GiB, 1.12 GiB free` where the error says so, else its first line."""
    text = str(error)
    size, free = _SIZE.search(text), _FREE.search(text)
    if size is None:
        return next(iter(text.splitlines()), type(error).__name__)
    return f"tried to allocate {size[1]}" + (f", {free[1]} free" if free else "")
