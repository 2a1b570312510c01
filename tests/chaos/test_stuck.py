"""A step that never ends, and a server that is asked what it is doing."""

import re
import signal
from functools import partial
from itertools import islice
from pathlib import Path

from tests.support.server import ServerProcess, token_ids_of, wait_until

BODY = {"prompt": "Once upon a time", "max_tokens": 40, "ignore_eos": True}


def test_a_stuck_step_is_found_out_and_the_stream_continues(default_model_dir: Path) -> None:
    """Each life of the engine core is stuck in its 30th step: the first cannot finish, the second can."""
    options = ("--enable-debug", "--inject-faults", "stall=600@step:30", "--step-timeout", "2")
    with ServerProcess(str(default_model_dir), *options) as server:
        seen: list[str] = []
        with server.stream(**BODY) as events:
            first = list(islice(events, 2))
            wait_until("503", lambda: server.http.get("/health").status_code == 503)
            seen += server.log
            tokens = token_ids_of([*first, *events])
        assert tokens == server.generate(**{**BODY, "max_tokens": 20})["token_ids"] + tokens[20:]
        assert len(tokens) == 40
        assert any("Timeout (0:00:02)!" in line for line in seen)  # faulthandler's headline …
        assert any('faults.py", line' in line and "_strike" in line for line in seen)  # … and where it was stuck
        server.settle()


def test_sigusr1_shows_the_state_of_every_process(default_model_dir: Path) -> None:
    expected = (
        r"EngineCore.*decode queue: 1 requests",
        r"EngineCore.*shown: decode, 4 prompt \+ \d+ output tokens",
        r"EngineCore.*frontend [0-9a-f]{16}: heard .* 1 requests",
        r"Frontend.*shown: 4 prompt \+ \d+ output tokens, submitted",
        r"Current thread 0x.* \(most recent call first\)",
    )
    with ServerProcess(str(default_model_dir), "--enable-debug") as server:
        log: list[str] = []
        server._on_log = log.append  # stacks are longer than what it keeps
        with server.stream(**BODY | {"max_tokens": 2000}, request_id="shown") as events:
            next(events)
            server.process.send_signal(signal.SIGUSR1)
            for pattern in expected:
                wait_until(f"{pattern} in the log", partial(found, pattern, log))
            invariants = server.http.get("/debug/invariants").json()
            assert invariants["engine"]["integrity"] == "ok"
            assert invariants["frontend"]["requests"] == 1
        server.settle()


def found(pattern: str, log: list[str]) -> bool:
    return any(re.search(pattern, line) for line in log)
