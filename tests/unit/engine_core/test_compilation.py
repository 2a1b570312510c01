"""Compiled layers, here for a CPU: traced once, and found again by the next process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import save_tiny_model

pytest.importorskip("triton")

COMPILE = """
import json, sys
from pathlib import Path

import torch

from engine_core import model_loader
from engine_core.compilation import compile_layers, decoder_layers
from engine_core.kv_pool import KVPool
from engine_core.triton_linear import speed_up_small_batches
from minivllm.config import EngineConfig


class Attention:
    def attend(self, query, *_):
        return query.clone()


model_loader.pack_linears = lambda model: 0  # as on a GPU
loaded = model_loader.load_model(EngineConfig(device="cpu"), Path(sys.argv[1]))
pool = KVPool(loaded.layout, 2, 16, loaded.device)
pool.attach(loaded.layers)
pool.context.metadata = Attention()
speed_up_small_batches(decoder_layers(loaded))
compile_layers(loaded)
for size in (50, 17, 40):
    tokens = torch.zeros(1, size, dtype=torch.int64)
    with torch.inference_mode():
        loaded.model(input_ids=tokens, position_ids=tokens, use_cache=False)
from torch._dynamo.utils import counters
print(json.dumps({kind: counters[kind] for kind in ("stats", "aot_autograd", "inductor")}))
"""


def compile_in_a_process(model: Path) -> dict[str, Any]:
    result = subprocess.run([sys.executable, "-c", COMPILE, str(model)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    counters: dict[str, Any] = json.loads(result.stdout)
    return counters


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with it")
def test_one_trace_serves_all_layers_and_sizes_and_the_next_process_finds_it_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path / "cache"))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "0")  # trying all vector instructions takes longer than the test
    model = save_tiny_model("qwen3", tmp_path)
    first, second = compile_in_a_process(model), compile_in_a_process(model)
    assert list((tmp_path / "cache" / "inductor").iterdir()), "compiled code is kept in another directory"
    for counters in first, second:
        assert counters["stats"]["unique_graphs"] == 3  # the layer, rotary embedding, the last norm
        assert counters["aot_autograd"]["total"] == 3  # none given up half-way and begun again
    assert first["aot_autograd"]["autograd_cache_miss"] == 3
    assert second["aot_autograd"]["autograd_cache_hit"] == 3
    assert second["inductor"]["fxgraph_cache_hit"] == 3
