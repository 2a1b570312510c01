"""The roofline follows from the published configurations."""

import pytest
import torch

from engine_core.model_loader import read_config
from minivllm.bench.offline.cost import ModelCost, model_cost
from minivllm.bench.offline.machine import Ceilings, measure_ceilings, this_machine
from minivllm.bench.offline.shapes import SHAPES
from minivllm.bench.offline.work import Work, nano_work

LLAMA_PARAMETERS = 8_030_261_248
LLAMA_EMBEDDING = 128_256 * 4096


def test_llama_reads_all_weights_but_the_embedding_table() -> None:
    cost = model_cost(read_config(SHAPES / "llama-3.1-8b"), 2 * LLAMA_PARAMETERS, 131_072)
    assert cost.weight_bytes == 2 * (LLAMA_PARAMETERS - LLAMA_EMBEDDING)
    assert cost.flops_per_token == 2 * (LLAMA_PARAMETERS - 2 * LLAMA_EMBEDDING)
    assert cost.flops_per_pair == 4 * 32 * 32 * 128


def test_qwen_reads_its_tied_embedding_as_output_layer() -> None:
    layer = 1024 * (2048 + 2 * 1024) + 2048 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
    weight_bytes = 2 * (28 * layer + 1024 + 151_936 * 1024)
    cost = model_cost(read_config(SHAPES / "qwen3-0.6b"), weight_bytes, 114_688)
    assert cost.weight_bytes == weight_bytes
    assert cost.flops_per_token == weight_bytes - 2 * 151_936 * 1024
    work = nano_work(256, (100, 1024), (100, 1024), 151_936)
    assert work.num_decode_reads * 114_688 == pytest.approx(13.9e12, rel=0.01)


def test_prefill_is_bound_by_arithmetic_or_by_reading() -> None:
    cost = ModelCost(weight_bytes=1000, kv_bytes_per_token=10, flops_per_token=100, flops_per_pair=2)
    work = Work([[0] * 4], [1])
    assert cost.prefill_flops(work) == 4 * 100 + 10 * 2
    assert cost.prefill_seconds(work, 1, Ceilings(1e9, 42.0)) == 10.0
    assert cost.prefill_seconds(work, 3, Ceilings(100.0, 1e9)) == 30.0
    assert cost.decode_bytes(2, 7) == 2070


def test_ceilings_of_this_machine_are_possible_ones() -> None:
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32)
    assert 1e8 < ceilings.bytes_per_second < 1e13
    assert 1e8 < ceilings.flops_per_second < 1e15
    machine = this_machine(torch.device("cpu"))
    assert machine.versions["torch"] == torch.__version__
    assert machine.date in str(machine)
