"""Find out how a model calls attention before trusting it: one small forward pass with a function that only watches.

A model may bypass the registry, or pass an argument that changes the result (attention sinks, say). Ignoring either
would give wrong text silently, so the model is refused by name instead.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from minivllm.errors import ModelError

PROBE_NAME = "minivllm_probe"
_HONOURED = {"scaling", "sliding_window", "softcap"}
# Arguments that carry no meaning for a packed causal pass without dropout.
_HARMLESS = {"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states"}
_HARMLESS |= {"cache_position", "layer_head_mask", "head_mask", "position_embeddings", "return_dict", "logits_to_keep"}
_HARMLESS |= {"output_router_logits"}
_LAYER_TYPES = {"full_attention", "sliding_attention"}


class AttentionLayer(NamedTuple):
    """One attention module and the shape of its cache."""

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None
    scaling: float | None  # None: head_dim ** -0.5
    softcap: float | None


class _Watcher:
    """Registered as attention and as mask function during the probe."""

    def __init__(self) -> None:
        self.layers: list[AttentionLayer] = []
        self.complaints: dict[str, None] = {}  # ordered, without repetitions
        self.mask_windows: set[int] = set()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any
    ) -> tuple[Tensor, None]:
        unknown = {k for k, v in arguments.items() if v is not None and k not in _HONOURED | _HARMLESS}
        for name in sorted(unknown):
            self.complaints[f"its attention passes {name!r}, which is not honoured here"] = None
        if arguments.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            self.complaints["its attention is not causal"] = None
        if mask is not None:
            self.complaints["it builds its own attention mask"] = None
        window = arguments.get("sliding_window")
        sizes = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        self.layers.append(AttentionLayer(module, *sizes, window, arguments.get("scaling"), arguments.get("softcap")))
        output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None

    def mask(self, *_: Any, local_size: int | None = None, use_vmap: bool = False, **__: Any) -> None:
        if local_size is not None:
            self.mask_windows.add(local_size)
        if use_vmap:
            self.complaints["it adds its own rule to the attention mask"] = None


@torch.inference_mode()
def probe_attention(model: PreTrainedModel) -> list[AttentionLayer]:
    """The attention layers of `model` in the order they run. Raises `ModelError` naming what is not supported."""
    watcher = _Watcher()
    AttentionInterface.register(PROBE_NAME, watcher.attend)
    AttentionMaskInterface.register(PROBE_NAME, watcher.mask)
    model.set_attn_implementation(PROBE_NAME)
    tokens = torch.arange(2, device=model.device)[None]  # [1, 2]
    model(input_ids=tokens, position_ids=tokens, use_cache=False)
    _check(model.config.get_text_config(), type(model).__name__, watcher)
    return list(watcher.layers)


def _check(config: PretrainedConfig, architecture: str, watcher: _Watcher) -> None:
    complaints = list(watcher.complaints)
    if len(watcher.layers) != config.num_hidden_layers:
        complaints.append(f"{len(watcher.layers)} of its {config.num_hidden_layers} layers call the attention registry")
    other_types = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if other_types or getattr(config, "attention_chunk_size", None):
        complaints.append(f"it has layers of type {', '.join(sorted(other_types)) or 'chunked attention'}")
    if not watcher.mask_windows <= {layer.sliding_window for layer in watcher.layers}:
        complaints.append("its sliding window is only in the mask, not passed to attention")
    if len({layer[1:5] for layer in watcher.layers}) > 1:
        complaints.append("its layers have caches of different shapes")
    if len({id(layer.module) for layer in watcher.layers}) != len(watcher.layers):
        complaints.append("it runs one attention module several times in a pass")
    if complaints:
        raise ModelError(f"{architecture} cannot run here: {'; '.join(complaints)}")
