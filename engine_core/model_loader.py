"""An untouched Hugging Face decoder: read once, checked for what this engine needs, attending through the pool."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from engine_core.attention.paged import ATTENTION_NAME, paged_attention
from engine_core.attention.probe import PROBE_NAME, AttentionLayer, probe_attention
from engine_core.cpu_linear import pack_linears, packed_bytes
from engine_core.fusion import fuse_projections
from engine_core.heap import trim_heap
from engine_core.kv_pool import KVLayout
from minivllm.config import EngineConfig
from minivllm.errors import ModelError, StartupError

_SAMPLER_COPIES = 6  # float32 logits, sorted, cumulated, noise …
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True, kw_only=True)
class ModelFacts:
    """What scheduling and admission need to know of a model."""

    layout: KVLayout
    device: torch.device
    eos_token_ids: tuple[int, ...]
    max_positions: int  # longest sequence the model was made for
    vocab_size: int
    weight_bytes: int  # as they are kept here


@dataclass(slots=True, kw_only=True)
class LoadedModel(ModelFacts):
    """The model itself, and the facts about it."""

    model: PreTrainedModel
    layers: list[AttentionLayer]
    num_heads: int


def load_model(config: EngineConfig, directory: Path) -> LoadedModel:
    """Read the model in `directory`. Raises `ModelError` or `StartupError` with one line that says why not."""
    transformers.utils.logging.set_verbosity_error()  # what matters is raised, and progress is ours to show
    transformers.utils.logging.disable_progress_bar()
    device = choose_device(config)
    hf_config = read_config(directory, config.trust_remote_code)
    dtype = _choose_dtype(config, hf_config, device)
    if config.load_format == "dummy":
        model = _random_model(hf_config, dtype, device, config)
    else:
        model = _read_model(directory, hf_config, dtype, device, config)
    model.eval().requires_grad_(False)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    layers = probe_attention(model)
    if not config.enforce_eager:
        fuse_projections(model)
        pack_linears(model)
        trim_heap()  # of copies in other layouts
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    model.set_attn_implementation(ATTENTION_NAME)
    first = layers[0]
    if first.key_dim != first.value_dim:
        raise ModelError(f"{type(model).__name__} has keys of {first.key_dim} and values of {first.value_dim} numbers")
    return LoadedModel(
        model=model,
        layers=layers,
        layout=KVLayout(len(layers), first.num_kv_heads, first.key_dim, dtype),
        num_heads=first.num_heads,
        device=device,
        eos_token_ids=_eos_token_ids(directory, hf_config),
        max_positions=_max_positions(hf_config),
        vocab_size=vocab_size,
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()) + packed_bytes(model),
    )


@torch.inference_mode()
def measure_activation_bytes(loaded: LoadedModel, num_tokens: int, num_seqs: int) -> int:
    """Peak bytes that a pass needs beside weights and KV cache, from one real pass on a GPU; 0 on a CPU."""
    if loaded.device.type != "cuda":
        return 0
    loaded.model.set_attn_implementation(PROBE_NAME)
    before = torch.cuda.memory_allocated(loaded.device)
    torch.cuda.reset_peak_memory_stats(loaded.device)
    tokens = torch.zeros(1, num_tokens, dtype=torch.int64, device=loaded.device)
    loaded.model(input_ids=tokens, position_ids=tokens, use_cache=False, logits_to_keep=1)
    loaded.model.set_attn_implementation(ATTENTION_NAME)
    sampling = num_seqs * loaded.vocab_size * 4 * _SAMPLER_COPIES
    return torch.cuda.max_memory_allocated(loaded.device) - before + sampling


def read_config(directory: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration in `directory`, if it is of a decoder that generates text. Raises `ModelError`."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"cannot read the configuration in {directory}: {_first_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{config.model_type} is an encoder-decoder model; only decoders run here")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not trust_remote_code:
        raise ModelError(f"transformers has no text-generating model for the configuration type {config.model_type!r}")
    checked: PretrainedConfig = config
    return checked


def choose_device(config: EngineConfig) -> torch.device:
    """The device asked for, or the best there is. Raises `StartupError`."""
    if config.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if config.device == "cuda":
        raise StartupError("--device cuda, but torch sees no CUDA device")
    return torch.device("cpu")


def _choose_dtype(config: EngineConfig, hf_config: PretrainedConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    if device.type == "cpu":
        return torch.float32  # most CPUs emulate bfloat16, hundreds of times slower
    own = getattr(hf_config, "dtype", None)
    return torch.bfloat16 if own in (None, torch.float32) else own


def _random_model(
    hf_config: PretrainedConfig, dtype: torch.dtype, device: torch.device, config: EngineConfig
) -> PreTrainedModel:
    torch.manual_seed(config.seed)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            hf_config, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
    return model


def _read_model(
    directory: Path, hf_config: PretrainedConfig, dtype: torch.dtype, device: torch.device, config: EngineConfig
) -> PreTrainedModel:
    _check_memory(directory, hf_config, dtype, device)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=hf_config,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the model in {directory}: {_first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):  # transformers would run on random numbers in their place
        raise ModelError(f"the weights in {directory} lack {len(missing)} tensors, {missing[0]} among them")
    model.to(device)  # type: ignore[arg-type]
    return model


def _check_memory(directory: Path, hf_config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
    stored = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    stored_dtype = getattr(hf_config, "dtype", None) or torch.float32
    needed = stored * dtype.itemsize // stored_dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ModelError(
            f"the weights need {needed / 2**30:.1f} GiB as {str(dtype).removeprefix('torch.')}, but {device} has "
            f"{free / 2**30:.1f} GiB free: choose a smaller model or --dtype"
        )


def _eos_token_ids(directory: Path, hf_config: PretrainedConfig) -> tuple[int, ...]:
    try:
        eos = GenerationConfig.from_pretrained(directory).eos_token_id
    except OSError:  # no generation_config.json
        eos = None
    if eos is None:
        eos = hf_config.get_text_config().eos_token_id
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)


def _max_positions(hf_config: PretrainedConfig) -> int:
    return int(getattr(hf_config.get_text_config(), "max_position_embeddings", None) or 2048)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
