"""Compile a decoder layer once and use it for all layers: inductor fuses what lies between the matrix products.

All layers have the same code and shapes, and their weights and caches are inputs of the compiled graph, so compiling
one of them compiles them all (regional compilation). The number of tokens is dynamic: prefill and decode share it too.
"""

import os

import torch
import triton
from torch import nn

from engine_core.epilogues import compile_fused
from engine_core.model_loader import LoadedModel
from engine_core.triton_launch import launches_overlap


def compile_layers(loaded: LoadedModel) -> int:
    """Mark every decoder layer for compilation at its first call; returns how many were found.

    What stands beside the list of layers is compiled, too: the last norm, and rotary embedding for all layers.
    """
    _settle_on_ptxas()
    torch._inductor.config.combo_kernels = True  # independent kernels side by side in one launch: q and k norms
    torch._inductor.config.triton.enable_pdl = launches_overlap(loaded.device)
    torch._dynamo.config.specialize_float = True  # the operators take numbers: else found out, and all traced again
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    layers = decoder_layers(loaded)
    for layer in layers:
        layer.compile(backend=compile_fused, dynamic=True, fullgraph=True)
    for module in _beside(layers, loaded.model):
        module.compile(dynamic=True)
    return len(layers)


def _beside(layers: list[nn.Module], model: nn.Module) -> list[nn.Module]:
    """The modules that run once a pass in the decoder that holds `layers`, embeddings left out. None without layers."""
    for module in model.modules() if layers else ():
        children = list(module.children())
        if any(isinstance(child, nn.ModuleList) and list(child) == layers for child in children):
            return [child for child in children if not isinstance(child, nn.ModuleList | nn.Embedding)]
    return []


def _settle_on_ptxas() -> None:
    """Triton's own. Inductor names torch's when it compiles something, but not when it finds all compiled; the name is
    part of the key of every kernel, and ours would be compiled again at the second start."""
    if torch.version.cuda is not None:
        os.environ.setdefault("TRITON_PTXAS_PATH", triton.knobs.nvidia.ptxas.path)


def decoder_layers(loaded: LoadedModel) -> list[nn.Module]:
    """The modules of the one list whose members hold one attention module each; empty when there is no such list."""
    attention = {layer.module for layer in loaded.layers}
    for module in loaded.model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(attention):
            held = [sum(child in attention for child in member.modules()) for member in module]
            if held == [1] * len(attention):
                return list(module)
    return []
