"""Matrix products on a CPU with weights laid out once for oneDNN, instead of at every call.

`F.linear` at batch 8 takes two to three times as long: it repacks the weights each time, or reads them in an order
made for large batches. The packed copy replaces the original, so it costs no memory (tied embeddings aside).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_TOLERANCE = 1e-3  # of the largest logit: packed products add up in another order, no more


class PackedLinear(nn.Module):
    """Stands where an `nn.Linear` or a GPT-2 `Conv1D` stood. Inference only, float32 on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out_features, in_features]."""
        super().__init__()
        self.out_features = weight.shape[0]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return y.view(*x.shape[:-1], self.out_features)


@torch.inference_mode()
def pack_linears(model: PreTrainedModel) -> int:
    """Replace every linear of a float32 model on a CPU; returns how many. Undone when the logits would change."""
    if model.device.type != "cpu" or model.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return 0
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
