"""The linear layers of a model on a CPU, with weights laid out once for the product in `cpu_kernels`.

The packed copy replaces the original, so it costs no memory (tied embeddings aside).
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Floats = npt.NDArray[np.float32]

_TOLERANCE = 1e-3  # of the largest logit: packed products add up in another order, no more


class PackedLinear(nn.Module):
    """Stands where an `nn.Linear` or a GPT-2 `Conv1D` stood. Inference only, float32 on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out_features, in_features]."""
        super().__init__()
        from engine_core import cpu_kernels  # numba: not needed on a GPU

        self.out_features, self.in_features = weight.shape
        missing = -self.out_features % cpu_kernels.PANEL
        panels = pad(weight.detach(), (0, 0, 0, missing)).view(-1, cpu_kernels.PANEL, self.in_features)
        self._panels = panels.transpose(1, 2).contiguous().numpy()
        bias = weight.new_zeros(self.out_features) if bias is None else bias.detach()
        self._bias = pad(bias, (0, missing)).numpy()
        self._linear = cpu_kernels.linear

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = self.new_output(len(rows))
        self.multiply(rows.numpy(), y)
        return torch.from_numpy(y)[:, : self.out_features].view(*x.shape[:-1], self.out_features)

    def new_output(self, num_rows: int) -> Floats:
        """Room for a product: [num_rows, out_features or more]."""
        return np.empty((num_rows, len(self._bias)), np.float32)

    def multiply(self, x: Floats, y: Floats) -> None:
        """Fill y, made by `new_output`, with the outputs for x [num_rows, in_features]."""
        self._linear(x, self._panels, self._bias, y)


@torch.inference_mode()
def pack_linears(model: PreTrainedModel) -> int:
    """Replace every linear of a float32 model on a CPU; returns how many. Undone when the logits would change."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return 0
    from engine_core.cpu_jit import set_num_threads

    num_threads = torch.get_num_threads()
    set_num_threads(num_threads)
    torch.set_num_threads(num_threads)  # numba, when it starts its threads, changes the number of OpenMP for all
    before = _logits(model)
    originals: list[tuple[nn.Module, str, Any]] = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in list(parent.named_children())
        if type(child) in (nn.Linear, Conv1D)
    ]
    for parent, name, child in originals:
        setattr(parent, name, PackedLinear(child.weight if type(child) is nn.Linear else child.weight.t(), child.bias))
    if not _gives(model, before):
        for parent, name, child in originals:
            setattr(parent, name, child)
        return 0
    for parameter in model.parameters():  # the few that are left would keep the whole file of weights in memory
        parameter.data = parameter.data.clone()
    return len(originals)


def _gives(model: PreTrainedModel, expected: Tensor) -> bool:
    try:
        difference = (_logits(model) - expected).abs().max()
    except AttributeError:  # model code that reads a weight itself
        return False
    return bool(difference <= _TOLERANCE * expected.abs().max())


def _logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.arange(2, device=model.device)[None]
    logits: Tensor = model(input_ids=tokens, position_ids=tokens, use_cache=False).logits
    return logits
