"""y = x Wᵀ + b on a CPU for any number of rows: numba compiles it at first use, around a micro-kernel in LLVM IR.

W [out, in] ─▶ panels [out / PANEL, in, PANEL]      y[rows, panel] += x[rows, k] * panel[k]   for k in order,
               each is read once, front to back     the sums of up to 8 rows stay in registers

Panels are of float32, or of pairs of bfloat16 (see `cpu_panels`) that become float32 on their way into the registers.
Few rows run at the speed of memory and many at that of arithmetic, where oneDNN's packed products take up to twice as
long. A sum is made in the same order however many rows there are, so an output does not depend on the batch. The shape
of the loops is that of BLIS (Van Zee and van de Geijn, ACM TOMS 2015).
"""

from typing import Any

from llvmlite import ir
from numba.core import types

from engine_core.cpu_jit import inner, intrinsic, njit, prange
from engine_core.cpu_vectors import IS_WIDE, WIDTH, Bits, Int, Vector, VectorEmitter

_NUM_VECTORS = 2
_MOST_ROWS = 8 if IS_WIDE else 5  # so many rows' sums fit into the registers, beside a line of the panel
PANEL = WIDTH * _NUM_VECTORS
_AHEAD = 512  # so far, in numbers of 32 bits, memory is read ahead of the arithmetic

_Pairs = ir.VectorType(Bits, WIDTH)


class _Emitter(VectorEmitter):
    """Writes the loop of one tile: `num_rows` rows by one panel."""

    def __init__(self, builder: Any, num_rows: int, in_pairs: bool) -> None:
        super().__init__(builder)
        self._num_rows = num_rows
        self._load_lines = self._load_pairs if in_pairs else self._load_line
        self._step = 2 if in_pairs else 1  # lines of weights in a line of memory
        self._prefetches = num_rows > 1  # one row goes at the speed of memory anyway

    def emit(self, x: Any, panels: Any, panel: Any, bias: Any, y: Any, num_inputs: Any, num_outputs: Any) -> None:
        """x and y point to the tile's first row, y also to its first column; bias likewise; `panel` is a number."""
        builder, rows = self.builder, range(self._num_rows)
        num_lines = builder.sdiv(num_inputs, Int(self._step))
        first_line = self.at(panels, builder.mul(builder.mul(panel, num_lines), Int(PANEL)))
        start = self._load_vectors(bias)
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(Int)
        sums = [[builder.phi(Vector) for _ in start] for _ in rows]
        memory = self.at(first_line, builder.mul(k, Int(PANEL)))
        lines = self._load_lines(memory)
        if self._prefetches:
            for address in self._vectors_at(self.at(memory, Int(_AHEAD))):
                self.prefetch(address, locality=3)
        for row, row_sums in zip(rows, sums, strict=True):
            totals = row_sums
            for index, weights in enumerate(lines):
                input_number = builder.add(builder.mul(k, Int(self._step)), Int(index))
                number = self.at(x, builder.mul(num_inputs, Int(row)), input_number)
                factor = self.broadcast(builder.load(number, align=4))
                totals = [self.multiply_add(factor, *pair) for pair in zip(weights, totals, strict=True)]
            for phi, first, total in zip(row_sums, start, totals, strict=True):
                phi.add_incoming(first, before)
                phi.add_incoming(total, loop)
        following = builder.add(k, Int(1))
        k.add_incoming(Int(0), before)
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, num_lines), loop, after)
        builder.position_at_end(after)
        for row, row_sums in zip(rows, sums, strict=True):
            targets = self._vectors_at(self.at(y, builder.mul(num_outputs, Int(row))))
            for total, target in zip(row_sums, targets, strict=True):
                self.store(total.incomings[1][0], target)

    def _vectors_at(self, pointer: Any) -> list[Any]:
        return [self.at(pointer, Int(vector * WIDTH)) for vector in range(_NUM_VECTORS)]

    def _load_vectors(self, pointer: Any) -> list[Any]:
        return [self.load(address) for address in self._vectors_at(pointer)]

    def _load_line(self, pointer: Any) -> list[list[Any]]:
        return [self._load_vectors(pointer)]

    def _load_pairs(self, pointer: Any) -> list[list[Any]]:
        """The line of the lower halves, then that of the upper ones. A bfloat16 is the upper half of a float32."""
        builder = self.builder
        pairs = [builder.bitcast(vector, _Pairs) for vector in self._load_vectors(pointer)]
        lower = [builder.shl(pair, ir.Constant(_Pairs, [16] * WIDTH)) for pair in pairs]
        upper = [builder.and_(pair, ir.Constant(_Pairs, [0xFFFF0000] * WIDTH)) for pair in pairs]
        return [[builder.bitcast(half, Vector) for half in line] for line in (lower, upper)]


def _write_tile(_: Any, x: Any, panels: Any, bias: Any, y: Any, panel: Any, start: Any, end: Any) -> Any:
    """The outputs of rows start … end - 1, at most `_MOST_ROWS`, in one panel. Each number of rows has its own code."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *arrays, panel, start, end = arguments
        x, panels, bias, y = (
            context.make_array(kind)(context, builder, array)
            for kind, array in zip(signature.args[:4], arrays, strict=True)
        )
        num_inputs, num_outputs = builder.extract_value(x.shape, 1), builder.extract_value(y.shape, 1)
        column = builder.mul(panel, Int(PANEL))
        done = builder.append_basic_block()
        choice = builder.switch(builder.sub(end, start), done)
        for num_rows in range(1, _MOST_ROWS + 1):
            choice.add_case(Int(num_rows), block := builder.append_basic_block())
            builder.position_at_end(block)
            emitter = _Emitter(builder, num_rows, in_pairs=signature.args[1].dtype == types.int32)
            emitter.emit(
                emitter.at(x.data, builder.mul(start, num_inputs)),
                panels.data,
                panel,
                emitter.at(bias.data, column),
                emitter.at(y.data, builder.mul(start, num_outputs), column),
                num_inputs,
                num_outputs,
            )
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(x, panels, bias, y, panel, start, end), emit


_tile = intrinsic(_write_tile)


@inner()
def multiply_panel(x: Any, panels: Any, bias: Any, y: Any, panel: Any) -> None:
    """`linear` for the outputs of one panel, for compiled code."""
    num_rows = x.shape[0]
    num_tiles = -(-num_rows // _MOST_ROWS)
    for tile in range(num_tiles):
        _tile(x, panels, bias, y, panel, num_rows * tile // num_tiles, num_rows * (tile + 1) // num_tiles)


@njit(parallel=True)
def linear(x: Any, panels: Any, bias: Any, y: Any) -> None:
    """y [num_rows, out] = x [num_rows, in] times `panels`, + bias [out]. float32 but for pairs, contiguous."""
    for panel in prange(panels.shape[0]):
        multiply_panel(x, panels, bias, y, panel)
