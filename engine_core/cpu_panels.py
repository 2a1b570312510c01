"""A matrix of weights as the products read it; at half the size where that loses nothing.

Models are published in bfloat16, so that the lower 16 bits of every weight are zero in float32. Two such weights, of
consecutive inputs, share 32 bits then (where inputs come in blocks of 32):

    float32   [num_panels, in, PANEL]            line k:  w0[k] … w31[k]
    bfloat16  [num_panels, in / 2, PANEL] int32  line k:  w0[2k+1]·w0[2k] … w31[2k+1]·w31[2k]    upper half · lower half

`cpu_kernels` takes them apart at no cost, and it is what the matrix unit of `cpu_tiles` multiplies.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine_core.cpu_kernels import PANEL

_LOWER = 0xFFFF  # bits of a float32 that a bfloat16 does not have
_BLOCK = 32  # the number of inputs that the matrix unit adds up at once


class Panels:
    """`data` of a float32 weight [num_rows, in], and its rows again. A copy: the weight itself is no longer needed."""

    def __init__(self, weight: Tensor) -> None:
        self.num_rows, num_inputs = weight.shape
        padded = pad(weight.detach().contiguous(), (0, 0, 0, -self.num_rows % PANEL))
        has_lower = bool(padded.view(torch.int32).bitwise_and(_LOWER).any())
        self.is_narrow = num_inputs % _BLOCK == 0 and not has_lower
        lines = padded.bfloat16().view(torch.int32) if self.is_narrow else padded
        self.data = lines.view(-1, PANEL, lines.shape[1]).transpose(1, 2).contiguous()

    def rows(self, index: Tensor) -> Tensor:
        """weight[index], bit for bit."""
        numbers = self.data[index // PANEL, :, index % PANEL]
        return numbers.contiguous().view(torch.bfloat16).float() if self.is_narrow else numbers
