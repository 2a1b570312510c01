"""The bits of float32 numbers in compiled code."""

from typing import Any

from llvmlite import ir
from numba import float32, int32

from engine_core.cpu_jit import intrinsic


@intrinsic
def bits(_: Any, number: Any) -> Any:
    """The bits of a float32 as int32."""
    return int32(float32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def from_bits(_: Any, number: Any) -> Any:
    """The float32 of these bits."""
    return float32(int32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())
