"""Tiny random models of many architectures, and Hugging Face's own `generate()` on them: the oracle of the engine."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 320
WINDOW = 12  # shorter than the sequences of the tests, and no multiple of a block
INIT_STD = 0.25  # large, so that greedy outputs vary instead of repeating one token

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2, "intermediate_size": 96}
_GEMMA = _GROUPED | {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}
_GEMMA["tie_word_embeddings"] = False  # its scaled embeddings would repeat the last token for ever
_FREE: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

TINY_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=24),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=256, **_FREE),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, intermediate_size=96),
    "gemma2": lambda: Gemma2Config(**_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=10.0),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA),
    "opt": lambda: OPTConfig(**_SIZES, ffn_dim=96, word_embed_proj_dim=64),
}


def make_tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model on the CPU in float32. Matrices are drawn wide; norms and biases keep what they start with."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, INIT_STD)
    model.eval()
    return model


def save_tiny_model(kind: str, directory: Path, eos_token_ids: Sequence[int] = ()) -> Path:
    """Write the tiny model `kind` into `directory` / `kind`, with these EOS ids in its generation config."""
    model = make_tiny_model(TINY_MODELS[kind]())
    if eos_token_ids and model.generation_config is not None:
        model.generation_config.eos_token_id = list(eos_token_ids)
    target = directory / "-".join((kind, *map(str, eos_token_ids)))
    model.save_pretrained(target)
    return target


class TinyModels:
    """Directories of tiny models, each written once per session: `models["llama"]`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._directories: dict[tuple[str, tuple[int, ...]], Path] = {}

    def __getitem__(self, kind: str) -> Path:
        return self.with_eos(kind)

    def with_eos(self, kind: str, *eos_token_ids: int) -> Path:
        key = (kind, eos_token_ids)
        if key not in self._directories:
            self._directories[key] = save_tiny_model(kind, self._root, eos_token_ids)
        return self._directories[key]


@cache
def hf_model(directory: Path) -> PreTrainedModel:
    """The model in `directory` as Hugging Face runs it: float32, eager attention, no end of sequence."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
    model.eval()
    return model


def hf_greedy(directory: Path, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What `generate()` continues `prompt` with, greedily and never stopping early."""
    return list(_hf_greedy(directory, tuple(prompt), max_tokens))


@cache
def _hf_greedy(directory: Path, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    tokens = torch.tensor([prompt])
    model: Any = hf_model(directory)
    output = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=max_tokens,
        pad_token_id=0,
    )
    return tuple(output[0, len(prompt) :].tolist())


def random_prompt(length: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """`length` token ids, a function of `seed`; no special ones of the models here."""
    generator = torch.Generator().manual_seed(seed * 1000 + length)
    return torch.randint(3, vocab_size, (length,), generator=generator).tolist()
