"""q/k/v and gate/up projections as one matrix product each, without touching model code.

A model calls q_proj(x), k_proj(x), v_proj(x) one after the other on the same x. The first is replaced by a module that
computes all of them in one product and returns its part; the others return theirs. Only groups that a watched pass
has shown to be called this way, in this order, are fused.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class FusedLinear(nn.Module):
    """Stands where the first projection stood: one linear for all, and what it computed for the others."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        self.linear = _concatenate(linears)
        self.waiting: tuple[Tensor, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        parts: tuple[Tensor, ...] = self.linear(x).split(self.sizes, -1)
        self.waiting = parts
        return parts[0]


class FusedPart(nn.Module):
    """Stands where a later projection stood: returns its part of what `FusedLinear` has just computed."""

    def __init__(self, source: FusedLinear, index: int) -> None:
        super().__init__()
        self._source = (source,)  # in a tuple: it is not a submodule of this one
        self._index = index
        self._is_last = index == len(source.sizes) - 1

    def forward(self, _: Tensor) -> Tensor:
        source = self._source[0]
        if source.waiting is None:
            raise RuntimeError("fused projections were called out of order")
        part = source.waiting[self._index]
        if self._is_last:
            source.waiting = None
        return part


@torch.inference_mode()
def fuse_projections(model: PreTrainedModel) -> int:
    """Fuse what can be fused in place; returns the number of groups."""
    groups = list(_candidates(model))
    calls = _record_calls(model, [linear for _, _, linears in groups for linear in linears])
    fused = 0
    for parent, names, linears in groups:
        if _called_in_turn(calls, linears):
            source = FusedLinear(linears)
            setattr(parent, names[0], source)
            for index, name in enumerate(names[1:], 1):
                setattr(parent, name, FusedPart(source, index))
            fused += 1
    return fused


def _concatenate(linears: list[nn.Linear]) -> nn.Linear:
    """One linear with the outputs of all, one after the other."""
    biases: list[Tensor | None] = [linear.bias for linear in linears]
    present = tuple(bias for bias in biases if bias is not None)
    with torch.device("meta"):  # its own weights are never made
        fused = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears), bool(present))
    fused.weight = nn.Parameter(torch.cat(tuple(linear.weight for linear in linears)), requires_grad=False)
    if present:
        fused.bias = nn.Parameter(torch.cat(present), requires_grad=False)
    return fused


def _candidates(model: PreTrainedModel) -> Iterator[tuple[nn.Module, tuple[str, ...], list[nn.Linear]]]:
    for parent in model.modules():
        for names in _GROUPS:
            linears = [child for name in names if type(child := getattr(parent, name, None)) is nn.Linear]
            same_bias = len({linear.bias is None for linear in linears}) == 1
            if len(linears) == len(names) and same_bias and len({linear.in_features for linear in linears}) == 1:
                yield parent, names, linears


def _record_calls(model: PreTrainedModel, linears: list[nn.Linear]) -> list[tuple[nn.Module, int]]:
    """(module, identity of its input) of every call of `linears` in one small pass."""
    calls: list[tuple[nn.Module, int]] = []
    inputs: list[Tensor] = []  # kept, so that identities stay unique

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])
        calls.append((module, id(args[0])))

    hooks = [linear.register_forward_pre_hook(record) for linear in linears]
    tokens = torch.arange(2, device=model.device)[None]
    model(input_ids=tokens, position_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def _called_in_turn(calls: list[tuple[nn.Module, int]], linears: list[nn.Linear]) -> bool:
    mine = [(module, source) for module, source in calls if module in linears]
    in_order = [module for module, _ in mine] == linears
    return in_order and len({source for _, source in mine}) == 1
