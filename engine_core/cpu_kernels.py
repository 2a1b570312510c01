"""y = x Wᵀ + b on a CPU for any number of rows: numba compiles it at first use, around a micro-kernel in LLVM IR.

W [out, in] ─▶ panels [out / PANEL, in, PANEL]      y[rows, panel] += x[rows, k] * panel[k]   for k in order,
               each is read once, front to back     the sums of up to 8 rows stay in registers

Few rows run at the speed of memory and many at that of arithmetic, where oneDNN's packed products take up to twice as
long. A sum is made in the same order however many rows there are, so an output does not depend on the batch. The shape
of the loops is that of BLIS (Van Zee and van de Geijn, ACM TOMS 2015).
"""

from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, types

from engine_core.cpu_jit import inner, intrinsic, njit, prange

_WIDE = bool(binding.get_host_cpu_features().get("avx512f", False))
_WIDTH = 16 if _WIDE else 8  # float32 numbers in a vector; LLVM splits it where registers are smaller
_NUM_VECTORS = 2
_MOST_ROWS = 8 if _WIDE else 4  # so many rows' sums fit into the registers
PANEL = _WIDTH * _NUM_VECTORS

_Float, _Int = ir.FloatType(), ir.IntType(64)
_Vector = ir.VectorType(_Float, _WIDTH)
_FMA = ir.FunctionType(_Vector, [_Vector] * 3)


class _Emitter:
    """Writes the loop of one tile: `num_rows` rows by one panel. All addresses are in float32 numbers."""

    def __init__(self, builder: Any, num_rows: int) -> None:
        self._builder = builder
        self._num_rows = num_rows

    def emit(self, x: Any, panel: Any, bias: Any, y: Any, num_inputs: Any, num_outputs: Any) -> None:
        """x and y point to the tile's first row, panel to its weights, bias and y to its first column."""
        builder, rows = self._builder, range(self._num_rows)
        start = self._load_vectors(bias)
        fma = cgutils.get_or_insert_function(builder.module, _FMA, f"llvm.fma.v{_WIDTH}f32")  # type: ignore[no-untyped-call]
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(_Int)
        sums = [[builder.phi(_Vector) for _ in start] for _ in rows]
        weights = self._load_vectors(self.at(panel, builder.mul(k, _int(PANEL))))
        for row, row_sums in zip(rows, sums, strict=True):
            number = self._broadcast(builder.load(self.at(x, builder.mul(num_inputs, _int(row)), k), align=4))
            for total, first, weight in zip(row_sums, start, weights, strict=True):
                total.add_incoming(first, before)
                total.add_incoming(builder.call(fma, [number, weight, total]), loop)
        following = builder.add(k, _int(1))
        k.add_incoming(_int(0), before)
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, num_inputs), loop, after)
        builder.position_at_end(after)
        for row, row_sums in zip(rows, sums, strict=True):
            targets = self._vectors_at(self.at(y, builder.mul(num_outputs, _int(row))))
            for total, target in zip(row_sums, targets, strict=True):
                builder.store(total.incomings[1][0], target, align=4)

    def at(self, pointer: Any, *offsets: Any) -> Any:
        for offset in offsets:
            pointer = self._builder.gep(pointer, [offset], source_etype=_Float)
        return pointer

    def _vectors_at(self, pointer: Any) -> list[Any]:
        starts = [self.at(pointer, _int(vector * _WIDTH)) for vector in range(_NUM_VECTORS)]
        return [self._builder.bitcast(start, _Vector.as_pointer()) for start in starts]

    def _load_vectors(self, pointer: Any) -> list[Any]:
        return [self._builder.load(address, align=4) for address in self._vectors_at(pointer)]

    def _broadcast(self, number: Any) -> Any:
        nothing, zero = ir.Constant(_Vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), _WIDTH), [0] * _WIDTH)
        return self._builder.shuffle_vector(self._builder.insert_element(nothing, number, zero), nothing, everywhere)


def _int(value: int) -> ir.Constant:
    return ir.Constant(_Int, value)


def _make_tile(num_rows: int) -> Any:
    """`tile(x, panels, bias, y, row, panel)` for compiled code: the outputs of `num_rows` rows from `row` on."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *arrays, row, panel = arguments
        x, panels, bias, y = (
            context.make_array(kind)(context, builder, array)
            for kind, array in zip(signature.args[:4], arrays, strict=True)
        )
        num_inputs, num_outputs = builder.extract_value(x.shape, 1), builder.extract_value(y.shape, 1)
        column = builder.mul(panel, _int(PANEL))
        emitter = _Emitter(builder, num_rows)
        emitter.emit(
            emitter.at(x.data, builder.mul(row, num_inputs)),
            emitter.at(panels.data, builder.mul(column, num_inputs)),
            emitter.at(bias.data, column),
            emitter.at(y.data, builder.mul(row, num_outputs), column),
            num_inputs,
            num_outputs,
        )
        return context.get_dummy_value()

    def tile(_: Any, x: Any, panels: Any, bias: Any, y: Any, row: Any, panel: Any) -> Any:
        return types.void(x, panels, bias, y, row, panel), emit

    return intrinsic(tile)


_tile_of_most, _tile_of_4, _tile_of_2, _tile_of_1 = (_make_tile(rows) for rows in (_MOST_ROWS, 4, 2, 1))


@inner()
def multiply_panel(x: Any, panels: Any, bias: Any, y: Any, panel: Any) -> None:
    """`linear` for the outputs of one panel, for compiled code."""
    num_rows, row = x.shape[0], 0
    while row + _MOST_ROWS <= num_rows:
        _tile_of_most(x, panels, bias, y, row, panel)
        row += _MOST_ROWS
    if row + 4 <= num_rows:
        _tile_of_4(x, panels, bias, y, row, panel)
        row += 4
    if row + 2 <= num_rows:
        _tile_of_2(x, panels, bias, y, row, panel)
        row += 2
    if row < num_rows:
        _tile_of_1(x, panels, bias, y, row, panel)


@njit(parallel=True)
def linear(x: Any, panels: Any, bias: Any, y: Any) -> None:
    """y [num_rows, out] = x [num_rows, in] times panels [out / PANEL, in, PANEL], + bias [out]. float32, contiguous."""
    for panel in prange(panels.shape[0]):
        multiply_panel(x, panels, bias, y, panel)
