"""The linear layers of a model on a CPU, with weights laid out once for the product in `cpu_kernels` or `cpu_tiles`.

The packed copy replaces the original. Embeddings are read from panels too: those of the output layer, where it is tied.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from engine_core.cpu_panels import Panels  # numba: not needed on a GPU

Floats = npt.NDArray[np.float32]

_TOLERANCE = 1e-3  # of the largest logit: packed products add up in another order, no more


class PackedLinear(nn.Module):
    """Stands where an `nn.Linear` or a GPT-2 `Conv1D` stood. Inference only, float32 on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out_features, in_features]."""
        super().__init__()
        from engine_core import cpu_kernels, cpu_panels, cpu_tiles  # numba: not needed on a GPU

        self.out_features, self.in_features = weight.shape
        self.panels = cpu_panels.Panels(weight)
        bias = weight.new_zeros(self.out_features) if bias is None else bias.detach()
        self._bias = pad(bias, (0, -self.out_features % cpu_kernels.PANEL)).numpy()
        self._panels = self.panels.data.numpy()
        uses_tiles = self.panels.is_narrow and cpu_tiles.can_use_tiles()
        self._linear = cpu_tiles.linear if uses_tiles else cpu_kernels.linear

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


class PackedEmbedding(nn.Module):
    """Stands where an `nn.Embedding` stood whose weights are in panels."""

    def __init__(self, panels: "Panels") -> None:
        super().__init__()
        self.panels = panels

    def forward(self, tokens: Tensor) -> Tensor:
        return self.panels.rows(tokens)


@torch.inference_mode()
def pack_linears(model: PreTrainedModel) -> int:
    """Replace every linear of a float32 model on a CPU; returns how many. Undone when the logits would change."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return 0
    from engine_core.cpu_jit import set_num_threads
    from engine_core.cpu_panels import Panels

    num_threads = torch.get_num_threads()
    set_num_threads(num_threads)
    torch.set_num_threads(num_threads)  # numba, when it starts its threads, changes the number of OpenMP for all
    before = _logits(model)
    linears = list(_children(model, nn.Linear, Conv1D))
    embeddings = list(_children(model, nn.Embedding))
    panels: dict[nn.Parameter, Panels] = {}
    for parent, name, child in linears:
        packed = PackedLinear(child.weight if type(child) is nn.Linear else child.weight.t(), child.bias)
        panels[child.weight] = packed.panels
        setattr(parent, name, packed)
    for parent, name, child in embeddings:
        setattr(parent, name, PackedEmbedding(panels.get(child.weight) or Panels(child.weight)))
    if not _gives(model, before):
        for parent, name, child in linears + embeddings:
            setattr(parent, name, child)
        return 0
    for parameter in model.parameters():  # the few that are left would keep the whole file of weights in memory
        parameter.data = parameter.data.clone()
    return len(linears)


def packed_bytes(model: PreTrainedModel) -> int:
    """Bytes of all panels in `model`, shared ones counted once."""
    panels = {module.panels for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding)}
    return sum(each.data.nbytes for each in panels)


def _children(model: PreTrainedModel, *kinds: type[nn.Module]) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, name, module) of every module of exactly these kinds."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) in kinds:
                yield parent, name, child


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
