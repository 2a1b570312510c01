"""y = x Wᵀ + b for weights that are bfloat16 numbers, with the matrix unit (AMX) that some CPUs have.

The unit multiplies tiles of bfloat16 and adds up in float32, at sixteen times the rate of vectors. A float32 number is
the sum of three bfloat16 numbers, exactly (8 + 8 + 8 bits of significand), so three products of tiles make one product
of float32 numbers; rounding is only in the sums, as elsewhere. (What is below 2^-126 counts as 0, infinity as NaN.)

    x [16 rows, 32 inputs] = high + middle + low       y [16 rows, 16 outputs] += part · Wᵀ for each part, in order
    W: 16 lines of pairs, see `cpu_panels`             two tiles of rows by two of outputs stay in the unit

What it does to a row does not depend on the others, so an output does not depend on the batch.
"""

import ctypes
import functools
import platform
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from engine_core.cpu_bits import bits, from_bits
from engine_core.cpu_jit import get_num_threads, inner, intrinsic, njit, prange
from engine_core.cpu_kernels import PANEL
from engine_core.cpu_prefetch import prefetch
from engine_core.cpu_vectors import Int, VectorEmitter

Floats = npt.NDArray[np.float32]

_ROWS, _OUTPUTS, _INPUTS = 16, 16, 32  # of a tile, and so many inputs are added up by one product
_PAIRS = _INPUTS // 2
_TILE = _ROWS * _PAIRS  # numbers of 32 bits
_PARTS = 3
_UPPER = -0x10000  # the bits of a float32 that are a bfloat16
_PANELS_AT_ONCE = 8  # stay in the L2 cache of a core while the rows go by, beside the rows of two tiles
_AHEAD = 2  # so many blocks of inputs are read ahead of the arithmetic
_FEW_TILES = 2  # not worth waking up the threads for
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


@functools.cache
def can_use_tiles() -> bool:
    """Whether this CPU has the unit; asks Linux for it, on behalf of all threads."""
    if platform.system() != "Linux" or PANEL != 2 * _OUTPUTS:  # panels are narrower without AVX-512
        return False
    features = binding.get_host_cpu_features()
    if not (features.get("amx-tile") and features.get("amx-bf16")):
        return False
    return bool(ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)  # type: ignore[no-untyped-call]


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(VectorEmitter(builder).at(data, index), ir.IntType(8).as_pointer())


def _mover(name: str) -> Any:
    """`move(tile, array, index, stride)`: between tile number `tile`, a literal, and lines that begin `stride` numbers
    of 32 bits apart, the first at `index`, as if the array had one dimension."""

    def move(_: Any, tile: Any, array: Any, index: Any, stride: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address = _address(context, builder, array, arguments[1], arguments[2])
            bytes_apart = builder.mul(arguments[3], Int(4))
            _call(builder, name, ir.IntType(8)(tile.literal_value), address, bytes_apart)
            return context.get_dummy_value()

        return types.void(tile, array, types.int64, types.int64), emit

    return intrinsic(prefer_literal=True)(move)


_load, _store = _mover("tileloadd64"), _mover("tilestored64")


@intrinsic(prefer_literal=True)
def _multiply(_: Any, total: Any, rows: Any, outputs: Any) -> Any:
    """Tile `total` += tile `rows` · tile `outputs`: literals."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "tdpbf16ps", *(ir.IntType(8)(tile.literal_value) for tile in (total, rows, outputs)))
        return context.get_dummy_value()

    return types.void(total, rows, outputs), emit


@intrinsic
def _configure(_: Any, description: Any) -> Any:
    """Tiles as the 64 bytes of `description` have it."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "ldtilecfg", _address(context, builder, description, arguments[0], Int(0)))
        return context.get_dummy_value()

    return types.void(description), emit


@intrinsic
def _release(_: Any) -> Any:
    """The tiles are no longer in use: less to save when threads change."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), emit


@inner()
def _describe(first_rows: Any, second_rows: Any) -> None:
    """Set up tiles: 0, 1, 4 have `first_rows` rows, 2, 3, 5 have `second_rows`, 6 and 7 are of weights."""
    description = np.zeros(64, np.uint8)
    description[0] = 1  # the only kind of tiles there is
    for tile in range(8):
        description[16 + 2 * tile] = 4 * _OUTPUTS
        description[48 + tile] = _PAIRS if tile >= 6 else second_rows if tile in {2, 3, 5} else first_rows
    _configure(description)


@inner()
def _multiply_panel(
    parts: Any, parts_at: Any, panels: Any, panel_at: Any, bias: Any, column: Any, y: Any, y_at: Any, is_tall: Any
) -> None:
    """One tile of rows by one panel, or two. `parts_at`, `panel_at`, `y_at`: where their numbers begin."""
    num_blocks, width = parts.shape[1], y.shape[1]
    _load(0, bias, column, 0)
    _load(1, bias, column + _OUTPUTS, 0)
    if is_tall:
        _load(2, bias, column, 0)
        _load(3, bias, column + _OUTPUTS, 0)
    for block in range(num_blocks):
        line = panel_at + block * _PAIRS * PANEL
        prefetch(panels, line + _AHEAD * _PAIRS * PANEL, _PAIRS * PANEL)
        _load(6, panels, line, PANEL)
        _load(7, panels, line + _OUTPUTS, PANEL)
        for part in range(_PARTS):
            _load(4, parts, parts_at + (block * _PARTS + part) * _TILE, _PAIRS)
            _multiply(0, 4, 6)
            _multiply(1, 4, 7)
            if is_tall:
                _load(5, parts, parts_at + ((num_blocks + block) * _PARTS + part) * _TILE, _PAIRS)
                _multiply(2, 5, 6)
                _multiply(3, 5, 7)
    _store(0, y, y_at, width)
    _store(1, y, y_at + _OUTPUTS, width)
    if is_tall:
        _store(2, y, y_at + _ROWS * width, width)
        _store(3, y, y_at + _ROWS * width + _OUTPUTS, width)


@inner()
def _multiply_panels(parts: Any, panels: Any, bias: Any, y: Any, first: Any, end: Any) -> None:
    """Outputs of panels [first, end)."""
    num_rows, width = y.shape
    rows_size, panel_size = parts.shape[1] * _PARTS * _TILE, panels.shape[1] * PANEL
    for row in range(0, num_rows, 2 * _ROWS):
        left = num_rows - row
        _describe(min(left, _ROWS), max(1, min(left - _ROWS, _ROWS)))
        for panel in range(first, end):
            column = panel * PANEL
            _multiply_panel(
                parts, row // _ROWS * rows_size, panels, panel * panel_size, bias, column, y, row * width + column,
                left > _ROWS,
            )  # fmt: skip
    _release()


@inner()
def _split_block(x: Any, high: Any, middle: Any, low: Any) -> None:
    """x [32] = high + middle + low, bits of bfloat16 numbers as int16."""
    for i in range(_INPUTS):
        upper = bits(x[i]) & np.int32(_UPPER)
        rest = x[i] - from_bits(upper)
        upper_rest = bits(rest) & np.int32(_UPPER)
        high[i] = upper >> 16
        middle[i] = upper_rest >> 16
        low[i] = bits(rest - from_bits(upper_rest)) >> 16


@inner()
def _split_rows(x: Any, parts: Any) -> None:
    """parts [in / 32, 3, 16, 32] int16 of up to 16 rows of x."""
    for row in range(len(x)):
        for block in range(len(parts)):
            part = parts[block]
            _split_block(x[row, block * _INPUTS : (block + 1) * _INPUTS], part[0, row], part[1, row], part[2, row])


@njit(parallel=True)
def _linear(x: Any, panels: Any, bias: Any, y: Any, parts: Any, num_threads: Any) -> None:
    num_tiles, num_panels = len(parts), len(panels)
    if num_tiles <= _FEW_TILES:
        for tile in range(num_tiles):
            _split_rows(x[tile * _ROWS : (tile + 1) * _ROWS], parts[tile])
    else:
        for tile in prange(num_tiles):
            _split_rows(x[tile * _ROWS : (tile + 1) * _ROWS], parts[tile])
    most = _PANELS_AT_ONCE * num_threads
    num_tasks = (num_panels + most - 1) // most * num_threads
    for task in prange(num_tasks):
        _multiply_panels(parts, panels, bias, y, num_panels * task // num_tasks, num_panels * (task + 1) // num_tasks)


def linear(x: Floats, panels: npt.NDArray[np.int32], bias: Floats, y: Floats) -> None:
    """`cpu_kernels.linear` for pairs of bfloat16 weights [num_panels, in / 2, PANEL] int32; in: a multiple of 32."""
    num_rows, num_inputs = x.shape
    shape = -(-num_rows // _ROWS), num_inputs // _INPUTS, _PARTS, _ROWS, _INPUTS
    parts = torch.empty(shape, dtype=torch.int16).numpy()  # torch, because its memory begins where a cache line does
    _linear(x, panels, bias, y, parts, get_num_threads())
