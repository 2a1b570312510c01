"""A standard decoder without its model code: the same logits, in whatever passes they are computed."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from engine_core.attention.cpu_attention import CpuAttention
from engine_core.attention.cpu_decode import CpuDecode
from engine_core.attention.cpu_prefill import CpuPrefill
from engine_core.attention.torch_backend import PrefillSpan
from engine_core.cpu_decoder import CpuDecoder, find_cpu_decoder
from engine_core.cpu_runner import CpuRunner
from engine_core.kv_pool import KVPool
from engine_core.model_loader import LoadedModel, load_model
from minivllm.config import EngineConfig
from tests.support.engines import running_engine
from tests.support.models import TINY_MODELS, WINDOW, TinyModels, hf_model, random_prompt

STANDARD = ("llama", "mistral", "qwen2", "qwen3")
LENGTHS = (2 * WINDOW + 5, 1, 9)
BLOCK_SIZE = 4
MAX_BLOCKS = 10


def load(directory: Path) -> tuple[LoadedModel, KVPool]:
    config = EngineConfig(model=str(directory), device="cpu", dtype="float32")
    loaded = load_model(config, directory)
    pool = KVPool(loaded.layout, len(LENGTHS) * MAX_BLOCKS, BLOCK_SIZE, loaded.device)
    pool.attach(loaded.layers)
    return loaded, pool


class Passes:
    """A decoder and requests of `LENGTHS`, request i in a row of blocks of its own."""

    def __init__(self, directory: Path) -> None:
        loaded, pool = load(directory)
        decoder = find_cpu_decoder(loaded, pool)
        assert decoder is not None
        self.decoder: CpuDecoder = decoder
        self.prompts = [random_prompt(length, seed=length) for length in LENGTHS]
        self.tables = torch.randperm(len(LENGTHS) * MAX_BLOCKS).view(len(LENGTHS), MAX_BLOCKS)

    def prefill(self, parts: list[tuple[int, int, int]], logits_index: Tensor | None = None) -> Tensor:
        """Logits of (request, start, end) `parts` in one pass."""
        spans, begin = [], 0
        for request, start, end in parts:
            spans.append(PrefillSpan(begin, begin + end - start, start, end, self.tables[request]))
            begin += end - start
        slots = torch.cat([self.slots(*part) for part in parts])
        return self.run(parts, CpuPrefill(slots, spans), logits_index)

    def decode(self, requests: list[int]) -> Tensor:
        """Logits of the last tokens of `requests` in one pass."""
        lengths = [LENGTHS[request] for request in requests]
        parts = [(request, length - 1, length) for request, length in zip(requests, lengths, strict=True)]
        slots = torch.cat([self.slots(*part) for part in parts])
        return self.run(parts, CpuDecode(slots, self.tables[requests], lengths), None)

    def run(self, parts: list[tuple[int, int, int]], attention: CpuAttention, logits_index: Tensor | None) -> Tensor:
        ids = [token for request, start, end in parts for token in self.prompts[request][start:end]]
        positions = torch.cat([torch.arange(start, end) for _, start, end in parts])
        with torch.inference_mode():
            return self.decoder.logits(torch.tensor(ids), positions, attention, logits_index)

    def slots(self, request: int, start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        return self.tables[request][positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


@pytest.fixture(params=STANDARD)
def directory(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Path:
    return tiny_models[request.param]


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_which_models_are_standard(tiny_models: TinyModels, kind: str) -> None:
    with running_engine(tiny_models[kind]) as engine:
        assert isinstance(engine.runner, CpuRunner)
        assert (engine.runner._decoder is not None) == (kind in STANDARD)


def test_eager_runs_the_models_own_code(tiny_models: TinyModels) -> None:
    with running_engine(tiny_models["llama"], enforce_eager=True) as engine:
        assert isinstance(engine.runner, CpuRunner)
        assert engine.runner._decoder is None


def test_logits_are_those_of_the_model(directory: Path) -> None:
    passes = Passes(directory)
    logits = passes.prefill([(request, 0, length) for request, length in enumerate(LENGTHS)]).split(list(LENGTHS))
    for prompt, found in zip(passes.prompts, logits, strict=True):
        with torch.inference_mode():
            expected = hf_model(directory)(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_logits_do_not_depend_on_the_pass(directory: Path) -> None:
    """Bit by bit: alone, beside others, in chunks, and those of the last tokens only."""
    passes = Passes(directory)
    together = passes.prefill([(request, 0, length) for request, length in enumerate(LENGTHS)]).split(list(LENGTHS))
    for request, (length, logits) in enumerate(zip(LENGTHS, together, strict=True)):
        assert torch.equal(passes.prefill([(request, 0, length)]), logits)
        cuts = sorted({0, 1, length // 2, length})
        chunks = [passes.prefill([(request, *cut)]) for cut in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(chunks), logits)
        index = torch.tensor([length - 1, 0])
        assert torch.equal(passes.prefill([(request, 0, length)], index), logits[index])


def test_a_decode_step_does_not_depend_on_its_batch(directory: Path) -> None:
    passes = Passes(directory)
    prefilled = passes.prefill([(request, 0, length) for request, length in enumerate(LENGTHS)]).split(list(LENGTHS))
    alone = torch.cat([passes.decode([request]) for request in range(len(LENGTHS))])
    torch.testing.assert_close(alone, torch.stack([logits[-1] for logits in prefilled]), rtol=1e-3, atol=1e-3)
    for batch_size in (4, 20):  # tasks of the heads that share a K/V head, and of all heads; alone: of one head each
        many = [index % len(LENGTHS) for index in range(batch_size)]
        assert torch.equal(passes.decode(many), alone[many])


def test_code_that_computes_something_else_is_kept(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named and shaped as usual, but with a factor of its own."""
    plain: Any = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda module, x: 1.1 * plain(module, x))
    assert find_cpu_decoder(*load(tiny_models["llama"])) is None


@pytest.mark.parametrize(
    ("module", "attribute", "other"),
    [
        ("model.layers.1.self_attn", "q_norm", nn.Identity()),  # on the queries alone
        ("model.layers.1", "input_layernorm", nn.LayerNorm(64)),
        ("model.layers.0", "residual_scale", nn.Identity()),
        ("model", "project_in", nn.Identity()),
        ("model.layers.1.mlp", "down_proj", nn.Linear(96, 64)),
        ("model.layers.1.self_attn", "q_proj", nn.Linear(64, 64)),
    ],
)
def test_modules_of_another_kind_are_not_standard(
    tiny_models: TinyModels, module: str, attribute: str, other: nn.Module
) -> None:
    loaded, pool = load(tiny_models["llama"])
    setattr(loaded.model.get_submodule(module), attribute, other)
    assert find_cpu_decoder(loaded, pool) is None


def test_heads_that_are_turned_in_part_are_not_standard(tiny_models: TinyModels) -> None:
    loaded, pool = load(tiny_models["llama"])
    rotary: Any = loaded.model.get_submodule("model.rotary_emb")
    rotary.inv_freq = rotary.inv_freq[:2]
    assert find_cpu_decoder(loaded, pool) is None
