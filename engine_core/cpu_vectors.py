"""Vectors of float32 numbers in LLVM IR, for code that numba would not compile into them by itself."""

from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

IS_WIDE = bool(binding.get_host_cpu_features().get("avx512f", False))
WIDTH = 16 if IS_WIDE else 8  # float32 numbers in a vector; LLVM splits it where registers are smaller

Float, Int, Bits = ir.FloatType(), ir.IntType(64), ir.IntType(32)
Vector = ir.VectorType(Float, WIDTH)
_FMA = ir.FunctionType(Vector, [Vector] * 3)
_Pointer = ir.IntType(8).as_pointer()
_PREFETCH = ir.FunctionType(ir.VoidType(), [_Pointer, Bits, Bits, Bits])


class VectorEmitter:
    """Writes instructions with a builder. All addresses are in numbers of 32 bits."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def at(self, pointer: Any, *offsets: Any) -> Any:
        """The address so many numbers further on."""
        for offset in offsets:
            pointer = self.builder.gep(pointer, [offset], source_etype=Float)
        return pointer

    def load(self, pointer: Any) -> Any:
        """The vector at `pointer`."""
        return self.builder.load(self.builder.bitcast(pointer, Vector.as_pointer()), align=4)

    def store(self, vector: Any, pointer: Any) -> None:
        """Put `vector` at `pointer`."""
        self.builder.store(vector, self.builder.bitcast(pointer, Vector.as_pointer()), align=4)

    def multiply_add(self, factor: Any, other: Any, total: Any) -> Any:
        """factor * other + total, rounded once."""
        fma = cgutils.get_or_insert_function(self.builder.module, _FMA, f"llvm.fma.v{WIDTH}f32")  # type: ignore[no-untyped-call]
        return self.builder.call(fma, [factor, other, total])

    def shuffle(self, first: Any, second: Any, lanes: list[int]) -> Any:
        """The numbers at `lanes` of both vectors, the second one's counted after the first one's."""
        return self.builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(Bits, len(lanes)), lanes))

    def broadcast(self, number: Any) -> Any:
        """A vector of this number."""
        nothing = ir.Constant(Vector, ir.Undefined)
        return self.shuffle(self.builder.insert_element(nothing, number, Bits(0)), nothing, [0] * WIDTH)

    def prefetch(self, pointer: Any, locality: int) -> None:
        """Begin to bring the cache line at `pointer`: into all caches (`locality` 3), or into the L2 cache (2)."""
        name = f"llvm.prefetch.{_Pointer.intrinsic_name}"
        function = cgutils.get_or_insert_function(self.builder.module, _PREFETCH, name)  # type: ignore[no-untyped-call]
        to_read, data = Bits(0), Bits(1)
        self.builder.call(function, [self.builder.bitcast(pointer, _Pointer), to_read, Bits(locality), data])
