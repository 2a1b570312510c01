"""What follows a linear in a layer's graph is taken over by it, where it stands in exactly the right form."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import gelu, silu

pytest.importorskip("triton")

from engine_core.epilogues import fuse_epilogues
from engine_core.fusion import fuse_projections
from engine_core.triton_linear import SmallBatchLinear, speed_up_small_batches
from tests.support.models import TINY_MODELS, make_tiny_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Rewriting:
    """A backend that runs what `fuse_epilogues` makes of a graph, and knows how much it fused."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.fused: list[int] = []

    def __call__(self, module: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        self.fused.append(fuse_epilogues(module.graph))
        module.recompile()
        return module.forward


def added_to(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


class Mlp(nn.Module):
    """That of Llama, but for how it is `gated` and how it is `added` to what came in."""

    def __init__(self, gated: Callable[[Tensor, Tensor], Tensor], added: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.both = SmallBatchLinear(nn.Linear(16, 24))
        self.down = SmallBatchLinear(nn.Linear(12, 16, bias=False))
        self.gated, self.added = gated, added

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).split([12, 12], -1)
        return self.added(x, self.down(self.gated(gate, up)))


@pytest.mark.parametrize(
    ("gated", "added", "fused"),
    [
        (lambda gate, up: silu(gate) * up, lambda x, y: x + y, 2),
        (lambda gate, up: silu(gate) * up, lambda x, y: y + x, 2),
        (lambda gate, up: silu(gate) * up, lambda x, y: added_to(y, x), 2),
        (lambda gate, up: silu(gate) * up, added_to, 1),  # changes what came in
        (lambda gate, up: silu(gate) * up, lambda x, y: y, 1),
        (lambda gate, up: silu(gate) * up, lambda x, y: (x + y).relu(), 1),  # the sum does not leave
        (lambda gate, up: silu(gate) * up, lambda x, y: x[:, :1] + y, 1),  # of another shape
        (lambda gate, up: silu(gate) * up, lambda x, y: x.double() + y, 1),  # of another type
        (lambda gate, up: silu(up) * gate, lambda x, y: x + y, 1),  # the wrong half
        (lambda gate, up: gelu(gate) * up, lambda x, y: x + y, 1),
        (lambda gate, up: silu(gate) * up + gate, lambda x, y: x + y, 1),  # one half is needed elsewhere
    ],
)
def test_only_the_exact_form_is_fused(
    gated: Callable[[Tensor, Tensor], Tensor], added: Callable[[Tensor, Tensor], Tensor], fused: int
) -> None:
    mlp, x, backend = Mlp(gated, added).to(DEVICE), torch.randn(3, 16, device=DEVICE), Rewriting()
    with torch.inference_mode():
        expected = mlp(x.clone())
        actual = torch.compile(mlp, backend=backend, dynamic=True, fullgraph=True)(x.clone())
        torch.testing.assert_close(actual, expected)
    assert backend.fused == [fused]


@pytest.mark.parametrize(("kind", "fused"), [("llama", 2), ("qwen3", 2), ("gemma3", 0), ("gpt2", 0)])
def test_layers_of_models_are_rewritten_and_compute_the_same(kind: str, fused: int) -> None:
    """Gemma normalizes before it adds, and its gate is another one; GPT-2 has no such linears."""
    model, tokens, backend = make_tiny_model(TINY_MODELS[kind]()), torch.tensor([[5, 9, 2]], device=DEVICE), Rewriting()
    nn.Module.to(model, DEVICE)
    layers = list(model.get_submodule("transformer.h" if kind == "gpt2" else "model.layers").children())
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits
        fuse_projections(model)
        speed_up_small_batches(layers)
        for layer in layers:
            layer.compile(backend=backend, dynamic=True, fullgraph=True)
        logits = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert set(backend.fused) == {fused}
