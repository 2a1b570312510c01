"""A server whose device runs out of memory again and again: the same tokens, the same process, and its log replays."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from minivllm.simulate.replay import replay
from tests.support.server import ServerProcess

STEPS = range(2, 26, 4)  # so far apart that no request fails twice alone, which would end it
BODIES: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "max_tokens": 4 + index, "temperature": index % 2, "seed": index}
    for index in range(4)
]


def test_shortages_cost_no_client_a_token(default_model_dir: Path, tmp_path: Path) -> None:
    faults = ",".join(f"oom@step:{step}" for step in STEPS)
    options = ("--enable-debug", "--inject-faults", faults, "--record", str(tmp_path / "log"))
    with ServerProcess(str(default_model_dir), *options) as server:
        engine_core = server.engine_core
        answers = ask_all(server)
        while server.settle()["minivllm:oom_recoveries_total"] < len(STEPS):
            ask_all(server)
        assert ask_all(server) == answers
        assert server.settle().finished.keys() == {"length"}
        assert server.engine_core == engine_core
    assert replay(tmp_path / "log")["Fail"] == len(STEPS)


def ask_all(server: ServerProcess) -> list[list[int]]:
    """The tokens of every body, all asked at once."""
    with ThreadPoolExecutor(len(BODIES)) as pool:
        answers = pool.map(lambda body: server.generate(**body, ignore_eos=True), BODIES)
        return [answer["token_ids"] for answer in answers]
