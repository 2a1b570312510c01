"""Models that run, and one clear line for each kind that does not."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from engine_core.model_loader import LoadedModel, load_model
from minivllm.config import EngineConfig
from minivllm.errors import ModelError, StartupError
from tests.support.models import TINY_MODELS, VOCAB_SIZE, WINDOW, TinyModels, save_tiny_model

_SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = _SMALL | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32, "num_local_experts": 2}


def load(directory: Path, **options: Any) -> LoadedModel:
    return load_model(EngineConfig(**{"model": str(directory), "device": "cpu"} | options), directory)


def dummy(config: PretrainedConfig, directory: Path, **options: Any) -> LoadedModel:
    config.save_pretrained(directory)
    return load(directory, load_format="dummy", **options)


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), "Bloom.* 0 of its 2"),
        (lambda: transformers.FalconConfig(**_SMALL), "FalconForCausalLM cannot run here: 0 of its 2 layers"),
        (lambda: transformers.FalconConfig(**_SMALL, alibi=True), "FalconForCausalLM cannot run here: 0 of its 2"),
        (
            lambda: transformers.GPTJConfig(
                vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=0, eos_token_id=0
            ),
            "GPTJForCausalLM cannot run here: 0 of its 2 layers call the attention registry",
        ),
        (lambda: transformers.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4), "Mpt.* 0 of its 2 layers"),
        (lambda: transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "Mamba.* 0 of its 2"),
        (
            lambda: transformers.GptOssConfig(**_GROUPED, num_experts_per_tok=1, eos_token_id=0, pad_token_id=0),
            "GptOssForCausalLM cannot run here: .*passes 's_aux', which is not honoured here",
        ),
        (
            lambda: transformers.Llama4TextConfig(
                **_GROUPED, intermediate_size_mlp=32, attention_chunk_size=8, bos_token_id=0, eos_token_id=0
            ),
            "Llama4ForCausalLM cannot run here: .*chunked_attention",
        ),
        (lambda: transformers.BertConfig(**_SMALL, is_decoder=False), "its attention is not causal"),
        (lambda: transformers.T5Config(vocab_size=64, d_model=32, num_layers=1), "t5 is an encoder-decoder model"),
        (lambda: transformers.ViTConfig(hidden_size=32), "no text-generating model for the configuration type 'vit'"),
    ],
    ids=["bloom", "falcon", "falcon-alibi", "gpt-j", "mpt", "mamba", "gpt-oss", "llama4", "bert", "t5", "vit"],
)
def test_models_that_cannot_run_are_refused_by_name(
    tmp_path: Path, make_config: Callable[[], PretrainedConfig], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        dummy(make_config(), tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_dummy_weights_need_only_a_configuration(tmp_path: Path, kind: str) -> None:
    loaded = dummy(TINY_MODELS[kind](), tmp_path)
    assert loaded.vocab_size == VOCAB_SIZE
    assert len(loaded.layers) == loaded.layout.num_layers == loaded.model.config.num_hidden_layers
    assert loaded.eos_token_ids == ()
    assert loaded.max_positions == loaded.model.config.max_position_embeddings


def test_dummy_weights_are_those_of_the_seed(tmp_path: Path) -> None:
    first, again, other = (
        dummy(TINY_MODELS["llama"](), tmp_path, seed=seed, enforce_eager=True).model.get_output_embeddings().weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_windows_are_seen_per_layer(tiny_models: TinyModels) -> None:
    assert [layer.sliding_window for layer in load(tiny_models["mistral"]).layers] == [WINDOW] * 2
    assert [layer.sliding_window for layer in load(tiny_models["gemma2"]).layers] == [WINDOW, None] * 2
    assert [layer.sliding_window for layer in load(tiny_models["llama"]).layers] == [None] * 2


def test_head_may_be_tied_or_not(tiny_models: TinyModels) -> None:
    untied, tied = (load(tiny_models[kind], enforce_eager=True).model for kind in ("llama", "qwen2"))
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_honoured(tiny_models: TinyModels, dtype: str) -> None:
    loaded = load(tiny_models["llama"], dtype=dtype)
    assert loaded.layout.dtype == getattr(torch, dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {loaded.layout.dtype}


def test_absent_cuda_is_named(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StartupError, match="--device cuda, but torch sees no CUDA device"):
        load(tiny_models["llama"], device="cuda")
    assert load(tiny_models["llama"], device="auto").device.type == "cpu"


def test_a_model_larger_than_memory_is_refused_before_it_is_read(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ModelError, match=r"the weights need 0\.0 GiB as float32, but cpu has 0\.0 GiB free"):
        load(tiny_models["llama"])


def test_a_directory_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read the configuration in"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match="cannot read the configuration in"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "martian"}')
    with pytest.raises(ModelError, match="martian"):
        load(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    TINY_MODELS["llama"]().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load the model in"):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_weights_are_refused(tmp_path: Path, damage: str) -> None:
    directory = save_tiny_model("llama", tmp_path)
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "garbage": b"garbage" * 100, "empty": b""}[damage])
    with pytest.raises(ModelError, match="cannot load the model in"):
        load(directory)


def test_missing_and_misshapen_tensors_are_refused(tmp_path: Path) -> None:
    directory = save_tiny_model("llama", tmp_path)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = tensors.pop(name)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"lack 1 tensors, {name} among them"):
        load(directory)
    save_file(tensors | {name: tensor[:, :-1].contiguous()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="cannot load the model in"):
        load(directory)


def test_eos_comes_from_the_generation_config(tiny_models: TinyModels, tmp_path: Path) -> None:
    assert load(tiny_models.with_eos("llama", 5, 9)).eos_token_ids == (5, 9)
    config = TINY_MODELS["llama"]()
    config.eos_token_id = 7
    assert dummy(config, tmp_path).eos_token_ids == (7,)
