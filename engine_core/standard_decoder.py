"""Recognize a decoder that is built as Llama is: by the names, types and shapes of its modules.

Llama, Mistral, Qwen 2 and 3 and many others have these names. What the modules' code does with them is not looked at:
whoever uses the parts compares logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from engine_core.attention.paged import Floats, Scoring
from engine_core.attention.probe import AttentionLayer
from engine_core.cpu_linear import PackedLinear
from engine_core.fusion import FusedLinear

_MODEL = {"model", "lm_head"}
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class _NotStandardError(Exception):
    """The model is built differently."""


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm; without weights there is none."""

    weight: Floats  # [width] or [0]
    epsilon: np.float32


@dataclass(frozen=True, slots=True)
class StandardLayer:
    """norm, attention with fused projections, norm, gated MLP with fused projections."""

    input_norm: Norm
    qkv: PackedLinear
    query_norm: Norm  # of each head, before the rotation
    key_norm: Norm
    scoring: Scoring
    output: PackedLinear
    mlp_norm: Norm
    gate_up: PackedLinear
    down: PackedLinear


@dataclass(frozen=True, slots=True)
class StandardDecoder:
    """Embedding, layers, norm, projection to logits."""

    embed: nn.Module
    angles: nn.Module  # (any tensor, positions [1, n]) → cos, sin [1, n, head_dim]
    layers: list[StandardLayer]
    norm: Norm
    head: PackedLinear


def recognize(model: Any, attention_layers: Sequence[AttentionLayer]) -> StandardDecoder | None:
    """The parts of a model whose linears were fused and packed; None if it is built differently."""
    try:
        return _decoder(model, attention_layers)
    except _NotStandardError:
        return None


def _decoder(model: Any, attention_layers: Sequence[AttentionLayer]) -> StandardDecoder:
    _check(_names(model) == _MODEL and _names(model.model) == _DECODER)
    _check(len(model.model.layers) == len(attention_layers))
    head = _packed(model.lm_head)
    return StandardDecoder(
        embed=model.model.embed_tokens,
        angles=model.model.rotary_emb,
        layers=[_layer(*pair) for pair in zip(model.model.layers, attention_layers, strict=True)],
        norm=_norm(model.model.norm, head.in_features),
        head=head,
    )


def _layer(layer: Any, attention: AttentionLayer) -> StandardLayer:
    _check(_names(layer) == _LAYER and layer.self_attn is attention.module)
    mixer, mlp = layer.self_attn, layer.mlp
    has_head_norms = _names(mixer) == _ATTENTION | _HEAD_NORMS
    _check((has_head_norms or _names(mixer) == _ATTENTION) and _names(mlp) == _MLP)
    qkv, gate_up = _fused(mixer.q_proj), _fused(mlp.gate_proj)
    scaling = attention.key_dim**-0.5 if attention.scaling is None else attention.scaling
    no_norm = Norm(np.empty(0, np.float32), np.float32(0.0))
    return StandardLayer(
        input_norm=_norm(layer.input_layernorm, qkv.in_features),
        qkv=qkv,
        query_norm=_norm(mixer.q_norm, attention.key_dim) if has_head_norms else no_norm,
        key_norm=_norm(mixer.k_norm, attention.key_dim) if has_head_norms else no_norm,
        scoring=Scoring(scaling, attention.sliding_window, attention.softcap),
        output=_packed(mixer.o_proj),
        mlp_norm=_norm(layer.post_attention_layernorm, gate_up.in_features),
        gate_up=gate_up,
        down=_packed(mlp.down_proj),
    )


def _norm(module: Any, width: int) -> Norm:
    _check(hasattr(module, "variance_epsilon") and module.weight.shape == (width,))
    return Norm(module.weight.detach().numpy(), np.float32(module.variance_epsilon))


def _fused(module: nn.Module) -> PackedLinear:
    if not isinstance(module, FusedLinear):
        raise _NotStandardError
    return _packed(module.linear)


def _packed(module: nn.Module) -> PackedLinear:
    if not isinstance(module, PackedLinear):
        raise _NotStandardError
    return module


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()} - {"paged_layer"}


def _check(condition: bool) -> None:
    if not condition:
        raise _NotStandardError
