"""Programmatic dependent launch (NVIDIA, Hopper and later): a kernel starts while the one before it still ends.

before the wait   what does not depend on the last kernels: indices, addresses
after it          everything that an earlier kernel wrote is there, and what it read may be overwritten

A decode step is hundreds of kernels of a few microseconds; without this each begins only when the last is gone.
Every kernel launched so must wait before it reads what others write, and before it writes anything.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_FIRST_CAPABILITY = (9, 0)


@triton.jit
def wait_for_earlier_kernels(OVERLAPS: tl.constexpr):
    """Wait, then let the next kernel start. In this order: what starts then may take all before us for done."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()


@cache
def launches_overlap(device: torch.device) -> bool:
    """Whether the kernels of this device can be launched so."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY


class Limits(NamedTuple):
    """Of a device."""

    num_multiprocessors: int
    shared_memory: int  # bytes that one program can have


@cache
def limits_of(device: torch.device) -> Limits:
    """Of a GPU; where kernels are interpreted, those of an H200."""
    if device.type != "cuda":
        return Limits(132, 227 << 10)
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return Limits(properties["multiprocessor_count"], properties["max_shared_mem"])


def launch_options(overlaps: bool) -> dict[str, Any]:
    """Options of a launch of a kernel with `OVERLAPS`."""
    return {"launch_pdl": True} if overlaps else {}
