"""Memory asked for before it is read, where no core foresees what comes next."""

from typing import Any

from numba import types

from engine_core.cpu_jit import inner, intrinsic
from engine_core.cpu_vectors import VectorEmitter

_CACHE_LINE = 16  # float32 numbers


@intrinsic
def _prefetch_line(_: Any, array: Any, index: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        emitter = VectorEmitter(builder)
        emitter.prefetch(emitter.at(data, arguments[1]), locality=2)
        return context.get_dummy_value()

    return types.void(array, index), emit


@inner()
def prefetch(array: Any, start: Any, width: Any) -> None:
    """For compiled code: begin to bring numbers [start, start + width) of a contiguous array, 32 bits each."""
    for line in range(0, width, _CACHE_LINE):
        _prefetch_line(array, start + line)
