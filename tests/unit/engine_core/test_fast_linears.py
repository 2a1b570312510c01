"""Fused and packed projections: the same logits, fewer and faster products."""

import numpy as np
import pytest
import torch
from numba import njit
from torch import nn
from transformers import PreTrainedModel

from engine_core import cpu_tiles
from engine_core.cpu_linear import PackedEmbedding, PackedLinear, pack_linears, packed_bytes
from engine_core.cpu_panels import Panels
from engine_core.fusion import FusedLinear, _called_in_turn, fuse_projections
from tests.support.models import TINY_MODELS, make_tiny_model

TOKENS = torch.tensor([[5, 9, 2, 7, 7]])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        output: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return output


def count(model: PreTrainedModel, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.parametrize(("kind", "groups"), [("llama", 4), ("qwen2", 4), ("qwen3", 4), ("gpt2", 0), ("gpt_neox", 0)])
def test_fusing_changes_no_logits(kind: str, groups: int) -> None:
    model = make_tiny_model(TINY_MODELS[kind]())
    expected = logits(model)
    assert fuse_projections(model) == groups  # q/k/v and gate/up in each of two layers
    assert count(model, FusedLinear) == groups
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize(
    ("order", "inputs", "in_turn"),
    [
        ((0, 1, 2), (7, 7, 7), True),
        ((1, 0, 2), (7, 7, 7), False),  # another one first: its part would not be there yet
        ((0, 1, 2), (7, 7, 8), False),  # not of the same input
        ((0, 1), (7, 7), False),
        ((0, 1, 2, 0), (7, 7, 7, 7), False),
    ],
)
def test_only_projections_called_in_turn_are_fused(
    order: tuple[int, ...], inputs: tuple[int, ...], in_turn: bool
) -> None:
    linears = [nn.Linear(2, 2) for _ in range(3)]
    calls: list[tuple[nn.Module, int]] = [(linears[i], source) for i, source in zip(order, inputs, strict=True)]
    assert _called_in_turn(calls, linears) == in_turn


@pytest.mark.parametrize(("out_features", "in_features"), [(960, 576), (100, 64), (33, 7), (1, 3)])
def test_a_packed_product_does_not_depend_on_the_number_of_rows(out_features: int, in_features: int) -> None:
    torch.manual_seed(out_features)
    weight, bias, x = torch.randn(out_features, in_features), torch.randn(out_features), torch.randn(23, in_features)
    packed = PackedLinear(weight, bias)
    with torch.inference_mode():
        all_rows = packed(x)
        torch.testing.assert_close(all_rows.double(), x.double() @ weight.double().T + bias, rtol=1e-5, atol=1e-4)
        for num_rows in range(1, 23):
            assert torch.equal(packed(x[:num_rows]), all_rows[:num_rows])
        assert torch.equal(packed(x[None, :6].view(2, 3, -1)).view(6, -1), all_rows[:6])


def bfloat16_numbers(num_rows: int, num_columns: int) -> torch.Tensor:
    """float32, with the lower half of each number empty; some are special."""
    numbers = torch.randn(num_rows, num_columns).bfloat16().float()
    numbers[0, :5] = torch.tensor([0.0, -0.0, torch.inf, torch.finfo(torch.bfloat16).tiny / 2, -1.0])
    return numbers


@pytest.mark.parametrize(("num_rows", "num_columns"), [(96, 64), (33, 32), (1, 96)])
def test_panels_give_back_their_rows_at_half_the_size_where_that_is_exact(num_rows: int, num_columns: int) -> None:
    torch.manual_seed(num_rows)
    weight = bfloat16_numbers(num_rows, num_columns)
    narrow = Panels(weight)
    weight_of_more = weight.clone()
    weight_of_more[-1, -1] = 1 + 2**-8  # one bit too many for bfloat16
    wide = Panels(weight_of_more)
    assert (narrow.is_narrow, wide.is_narrow) == (True, False)
    assert 2 * narrow.data.nbytes == wide.data.nbytes
    assert not Panels(weight[:, 1:]).is_narrow  # the matrix unit takes 32 inputs at once
    index = torch.randint(0, num_rows, (2, 9))
    assert torch.equal(narrow.rows(index).view(torch.int32), weight[index].view(torch.int32))
    assert torch.equal(wide.rows(index).view(torch.int32), weight_of_more[index].view(torch.int32))


@pytest.mark.parametrize(("out_features", "in_features"), [(96, 64), (33, 32)])
def test_narrow_weights_change_no_bit_of_a_product_of_vectors(
    out_features: int, in_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_tiles, "can_use_tiles", lambda: False)
    torch.manual_seed(out_features)
    weight, bias = torch.randn(out_features, in_features).bfloat16().float(), torch.randn(out_features + 1)
    narrow = PackedLinear(weight, bias[:-1])
    wide = PackedLinear(torch.cat((weight, torch.full((1, in_features), 0.1))), bias)
    assert (narrow.panels.is_narrow, wide.panels.is_narrow) == (True, False)
    x = torch.randn(23, in_features)
    with torch.inference_mode():
        for num_rows in range(1, 23):
            assert torch.equal(narrow(x[:num_rows]), wide(x[:num_rows])[:, :-1])


@pytest.mark.skipif(not cpu_tiles.can_use_tiles(), reason="needs a CPU with AMX")
@pytest.mark.parametrize(("out_features", "in_features"), [(96, 64), (33, 32), (600, 576)])
def test_the_matrix_unit_is_exact_but_for_the_order_of_sums(
    out_features: int, in_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(out_features)
    weight, bias = torch.randn(out_features, in_features).bfloat16().float(), torch.randn(out_features)
    by_tiles = PackedLinear(weight, bias)
    monkeypatch.setattr(cpu_tiles, "can_use_tiles", lambda: False)
    by_vectors = PackedLinear(weight, bias)
    x = torch.randn(70, in_features)
    expected = x.double() @ weight.double().T + bias
    with torch.inference_mode():
        all_rows = by_tiles(x)
        assert not torch.equal(all_rows, by_vectors(x))
        errors = [(packed(x) - expected).norm() for packed in (by_tiles, by_vectors)]
        assert errors[0] <= errors[1]
        for num_rows in (1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 64):
            assert torch.equal(by_tiles(x[:num_rows]), all_rows[:num_rows])


def test_a_number_is_split_into_three_bfloat16_numbers_exactly() -> None:
    x = torch.randn(16, 64) * 10.0 ** torch.randint(-20, 20, (16, 64))
    x[0, :3] = torch.tensor([0.0, -1.0, torch.finfo(torch.float32).max])
    parts = np.empty((2, 3, 16, 32), np.int16)
    njit(cpu_tiles._split_rows.py_func)(x.numpy(), parts)
    numbers = torch.from_numpy(parts).view(torch.bfloat16)
    total = numbers.double().sum(1)  # [2, 16, 32]
    assert torch.equal(total.transpose(0, 1).reshape(16, 64), x.double())


@pytest.mark.parametrize("kind", sorted(TINY_MODELS))
def test_packing_replaces_every_linear_and_no_logits(kind: str) -> None:
    model = make_tiny_model(TINY_MODELS[kind]())
    fuse_projections(model)
    expected = logits(model)
    packed = pack_linears(model)
    assert packed == count(model, PackedLinear) > 0
    assert count(model, nn.Linear) == 0
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "is_tied"), [("qwen2", True), ("gpt2", True), ("llama", False)])
def test_a_tied_embedding_is_kept_once(kind: str, is_tied: bool) -> None:
    model = make_tiny_model(TINY_MODELS[kind]())
    expected = model.get_input_embeddings()(TOKENS)
    pack_linears(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert (embedding.panels is head.panels) == is_tied
    assert torch.equal(embedding(TOKENS), expected)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gpt_neox"])
def test_a_model_published_in_bfloat16_is_kept_at_half_the_size(kind: str) -> None:
    model, published = (make_tiny_model(TINY_MODELS[kind]()) for _ in range(2))
    published.bfloat16().float()
    expected = logits(published)
    assert pack_linears(model) == pack_linears(published)
    assert packed_bytes(model) == 2 * packed_bytes(published)
    torch.testing.assert_close(logits(published), expected, rtol=1e-3, atol=1e-3)


def test_packing_is_undone_where_a_model_reads_a_weight_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model(TINY_MODELS["llama"]())
    expected, linears = logits(model), count(model, nn.Linear)
    head = model.get_output_embeddings()
    forward = type(model).forward

    def reading_forward(self: PreTrainedModel, **arguments: object) -> object:
        assert self.get_output_embeddings().weight is not None
        return forward(self, **arguments)

    monkeypatch.setattr(type(model), "forward", reading_forward)
    assert pack_linears(model) == 0
    assert count(model, nn.Linear) == linears
    assert model.get_output_embeddings() is head
    assert torch.equal(logits(model), expected)


def test_other_number_formats_are_left_alone() -> None:
    model = make_tiny_model(TINY_MODELS["llama"]())
    model.bfloat16()
    assert pack_linears(model) == 0
