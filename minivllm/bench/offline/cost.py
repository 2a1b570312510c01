"""What a pass cannot do without: bytes to read and products to compute, from the model's configuration alone."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from minivllm.bench.offline.machine import Ceilings
from minivllm.bench.offline.work import Work


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Per pass, per token and per (query, key) pair. A sliding window is not counted: it reads less than this says."""

    weight_bytes: int  # read by every pass: all of them, but not an input embedding that is a table of its own
    kv_bytes_per_token: int
    flops_per_token: int  # of the layers' matrix products
    flops_per_pair: int  # of attention

    def decode_bytes(self, num_passes: int, num_reads: int) -> int:
        """Bytes that `num_passes` decode passes read, with the K/V of `num_reads` tokens in all."""
        return num_passes * self.weight_bytes + num_reads * self.kv_bytes_per_token

    def prefill_flops(self, work: Work) -> int:
        """Floating-point operations to prefill the prompts of `work`, the logits of their last tokens left out."""
        return work.num_prompt_tokens * self.flops_per_token + work.num_prefill_pairs * self.flops_per_pair

    def prefill_seconds(self, work: Work, num_passes: int, ceilings: Ceilings) -> float:
        """The least time to prefill `work`: arithmetic or reading the weights, whichever takes longer."""
        reading = num_passes * self.weight_bytes / ceilings.bytes_per_second
        return max(reading, self.prefill_flops(work) / ceilings.flops_per_second)


def model_cost(config: PretrainedConfig, weight_bytes: int, kv_bytes_per_token: int) -> ModelCost:
    """Counted on a model without memory, so that it does not matter how an engine lays out its weights.

    `weight_bytes` is what all of them take in the engine.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    read = numbers if embedding is head else numbers - embedding.numel()
    return ModelCost(
        weight_bytes=weight_bytes * read // numbers,
        kv_bytes_per_token=kv_bytes_per_token,
        flops_per_token=2 * (read - head.numel()),
        flops_per_pair=4 * text.num_hidden_layers * text.num_attention_heads * head_dim,
    )
