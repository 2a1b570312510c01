"""A matrix of weights as the product in `cpu_kernels` reads it; at half the size where that loses nothing.

Models are published in bfloat16, so that the lower 16 bits of every weight are zero in float32. Two such weights share
32 bits then, and taking them apart again costs the product nothing:

    float32   [num_panels, in, PANEL]                     w0 w1 … w31
    bfloat16  [num_panels, in, PANEL / 2] int32           w16·w0 w17·w1 … w31·w15      upper half · lower half
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine_core.cpu_kernels import PANEL

_HALF = PANEL // 2
_LOWER, _UPPER = 0xFFFF, -0x10000  # bits of an int32


class Panels:
    """`data` of a float32 weight [num_rows, in], and its rows again. A copy: the weight itself is no longer needed."""

    def __init__(self, weight: Tensor) -> None:
        self.num_rows, num_inputs = weight.shape
        padded = pad(weight.detach(), (0, 0, 0, -self.num_rows % PANEL))
        panels = padded.view(-1, PANEL, num_inputs).transpose(1, 2)
        self.is_narrow = not weight.detach().contiguous().view(torch.int32).bitwise_and(_LOWER).any()
        self.data = _in_pairs(panels) if self.is_narrow else panels.contiguous()

    def rows(self, index: Tensor) -> Tensor:
        """weight[index], bit for bit."""
        panel, column = index // PANEL, index % PANEL
        if not self.is_narrow:
            return self.data[panel, :, column]
        pairs = self.data[panel, :, column % _HALF]
        shift = torch.where(column < _HALF, 16, 0).to(torch.int32)
        return pairs.bitwise_left_shift(shift[..., None]).bitwise_and(_UPPER).view(torch.float32)


def _in_pairs(panels: Tensor) -> Tensor:
    """[num_panels, in, PANEL] float32 to [num_panels, in, PANEL / 2] int32."""
    bits = panels.contiguous().view(torch.int32)
    return bits[..., :_HALF].bitwise_right_shift(16).bitwise_and(_LOWER).bitwise_or(bits[..., _HALF:])
