"""e^x in float32 for compiled code, without branches or calls, so that LLVM computes many at once."""

import math
from typing import Any

import numpy as np
from numba import int32

from engine_core.cpu_bits import bits, from_bits
from engine_core.cpu_jit import inner

_LOG2_E = np.float32(math.log2(math.e))
_LOWEST = np.float32(-126.0)  # 2 to this is the smallest normal number; what is smaller may as well be it
_ROUND = np.float32(1.5 * 2**23)  # adding it leaves no bits behind the point
_ROUND_BITS = 0x4B400000 - 127  # … and its bits, less the bias of an exponent
# ln(2)^i / i!: the Taylor series of 2^f, for |f| <= 1/2 within a rounding of float32
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(math.log(2) ** i / math.factorial(i)) for i in range(1, 7))


@inner(fastmath=False)  # said aloud: it would be inherited from the caller, and undo the rounding
def exp(x: Any) -> Any:
    """e^x for x <= 0 within |x| + 2 roundings."""
    t = max(x * _LOG2_E, _LOWEST)
    shifted = t + _ROUND
    f = t - (shifted - _ROUND)
    fraction = np.float32(1.0) + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    exponent = (bits(shifted) - int32(_ROUND_BITS)) << int32(23)
    return fraction * from_bits(int32(exponent))
