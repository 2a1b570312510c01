"""Converts a GGUF file into the Hugging Face layout: `python -m engine_core.gguf_import FILE.gguf DIRECTORY`.

transformers reads GGUF but refuses to save what it read, so the weights move into a fresh model of the same
configuration. A process of its own, because it needs torch and a gigabyte that nobody should keep.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, directory: Path) -> None:
    """Write config, float32 safetensors, generation config, tokenizer.json and chat template into `directory`."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are no longer quantised
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
