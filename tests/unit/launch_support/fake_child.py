"""A child process that behaves as told: `python fake_child.py LOG KIND BEHAVIOUR --config FILE`.

It writes what happens to it to LOG, one `KIND pid event` a line. A frontend answers every connection to the inherited
socket with all control messages so far as JSON.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from minivllm.control import ControlChannel
from minivllm.listener import LISTEN_FD_VARIABLE
from minivllm.transport import remove_socket_dir


class FakeChild:
    def __init__(self, log: Path, kind: str, config_file: Path) -> None:
        self.config = json.loads(config_file.read_text())
        self._log = log
        self._kind = kind
        self._messages: list[dict[str, Any]] = []
        self._got_message = threading.Event()

    def note(self, event: str) -> None:
        with self._log.open("a") as log:
            log.write(f"{self._kind} {os.getpid()} {event}\n")

    def on_message(self, message: dict[str, Any]) -> None:
        self._messages.append(message)
        self._got_message.set()
        if message.get("retire"):
            self.note("retired")
            os._exit(0)

    def await_message(self) -> None:
        self._got_message.wait()

    def on_parent_death(self) -> None:
        self.note("eof")
        if self._kind == "engine":
            remove_socket_dir(Path(self.config["socket_dir"]))
        os._exit(0)

    def on_sigterm(self, *_: object) -> None:
        self.note("sigterm")
        os._exit(0)

    def answer(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                self.await_message()
                connection.sendall(json.dumps(self._messages).encode())


def main(log: str, kind: str, behaviour: str, _: str, config_file: str) -> None:
    child = FakeChild(Path(log), kind, Path(config_file))
    signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "stubborn" else child.on_sigterm)
    signal.signal(signal.SIGINT, lambda *_: child.note("sigint"))
    signal.signal(signal.SIGUSR1, lambda *_: child.note("sigusr1"))
    environment = sorted(name for name in os.environ if name.startswith("MINIVLLM_") and not name.endswith("_FD"))
    child.note(f"started sid={os.getsid(0)} env={','.join(environment)} config={config_file}")
    control = ControlChannel.inherit()
    if behaviour != "stubborn":
        control.watch(child.on_message, child.on_parent_death)
    if behaviour == "crash":
        sys.exit(3)
    control.report("loading", detail="reading fake weights")
    if behaviour == "once" and len([line for line in Path(log).read_text().splitlines() if kind in line]) > 2:
        control.report("failed", reason="the fake model has gone", exit_code=1)  # it is not the first of its kind
        sys.exit(1)
    if behaviour == "fail":
        control.report("failed", reason="the fake model is too large: 9 GiB of 1 GiB", exit_code=1)
        sys.exit(1)
    if behaviour == "garbage":
        os.write(control._connection.fileno() if control._connection else 2, b"[]\nnot json\n")
    if behaviour != "silent":
        child.note("ready")  # before the launcher acts on it
        control.report("ready")
    if behaviour == "die later":
        time.sleep(1)
        os._exit(4)
    if behaviour == "die":
        child.await_message()  # the launcher speaks only when all were ready
        os._exit(4)
    if fd := os.environ.get(LISTEN_FD_VARIABLE):
        threading.Thread(target=child.answer, args=(socket.socket(fileno=int(fd)),), daemon=True).start()
    while True:
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
