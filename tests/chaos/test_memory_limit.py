"""An engine core that may not have more memory: what fits in smaller passes is answered, and only the rest fails."""

import resource
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.chaos.conftest import MakeModel
from tests.support.server import ServerProcess

WIDTH = 2**19  # of the layer in the middle: 2 MiB for each token of a pass, several times
SIZES = {
    "hidden_size": 16, "intermediate_size": WIDTH, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
ROOM = 96 * 2**20
BLOCK_SIZE = 64  # the smallest part of a prompt that is computed at once: 128 MiB, several times
OPTIONS = (
    *("--load-format", "dummy", "--max-model-len", "256", "--enable-debug"),
    *("--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", "64"),
)
SHORT = [{"prompt": [100 + index] * 4, "max_tokens": 3 + index % 3, "ignore_eos": True} for index in range(16)]
LONG = {"prompt": [7] * 200, "max_tokens": 4, "stream": False}


@pytest.mark.long  # how much of the address space is free depends on what the allocator did before: 1 run in some fails
def test_only_what_cannot_fit_fails_under_a_limit_of_memory(make_model: MakeModel) -> None:
    with ServerProcess(str(make_model(**SIZES)), *OPTIONS) as server:
        engine_core = server.engine_core
        expected = ask_all(server)
        limit = engine_core.memory_info().vms + ROOM
        resource.prlimit(engine_core.pid, resource.RLIMIT_AS, (limit, limit))
        with ThreadPoolExecutor(1) as aside:
            refused = aside.submit(server.http.post, "/generate", json=LONG)
            assert ask_all(server) == expected
            error = refused.result().json()["error"]
        assert refused.result().status_code == 500
        assert "out_of_memory: a prefill pass of 64 tokens of this request alone does not fit" in error["message"]
        assert "tried to allocate 268435456 bytes" in error["message"]
        assert server.settle()["minivllm:oom_recoveries_total"] >= 3
        assert server.engine_core == engine_core
        assert server.http.get("/debug/invariants").json()["engine"]["integrity"] == "ok"
        assert ask_all(server) == expected


def ask_all(server: ServerProcess) -> list[list[int]]:
    """The tokens of every short request, all asked at once."""
    with ThreadPoolExecutor(len(SHORT)) as pool:
        return list(pool.map(lambda body: server.generate(**body)["token_ids"], SHORT))
