"""An `EngineServer` in a thread, over real sockets."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine_core.cpu_jit import set_num_threads
from engine_core.engine import EngineCore
from engine_core.server import EngineServer
from minivllm import transport
from tests.support.engines import assert_idle, run_to_end

WAIT_SECONDS = 20.0
logger = logging.getLogger(__name__)


class ServedEngine:
    """`serve()` runs the loop in a thread; leaving the `with` block stops it and checks the engine for leaks."""

    def __init__(self, engine: EngineCore, directory: Path, **options: Any) -> None:
        self.engine = engine
        self.endpoints = transport.Endpoints.in_directory(directory)
        self.server = EngineServer(self.endpoints, **options)
        self.server.bind()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def serve(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Look until `condition()` holds."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def __enter__(self) -> "ServedEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        if self._thread.ident is None:
            self.server.close("the test is over")
            return
        self.join()
        self.engine.abort(list(self.engine._requests))
        run_to_end(self.engine)
        assert_idle(self.engine)

    def _run(self) -> None:
        set_num_threads(1)  # numba's number is one of each thread
        try:
            self.server.run(self.engine, self.engine.facts(1))
        except RuntimeError as error:
            logger.info("the server ended: %s", error)
            self.error = error
