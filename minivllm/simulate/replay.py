"""`minivllm replay FILE`: the decisions of a recorded run once more, through the same engine core, without a model.

What came from outside (requests, aborts, tokens, failures) is taken from the log; every pass that the engine core
launches must be the one in the log. So a bug report that holds a log reproduces anywhere.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from engine_core.decision_log import VERSION, Abort, Add, Engine, Entry, Fail, Launch, Step, Tokens
from engine_core.device import Device, ModelFreeTokens, Report, model_free_device
from engine_core.engine import EngineCore
from engine_core.scheduler import Batch
from minivllm.config import EngineConfig
from minivllm.errors import MiniVLLMError, StartupError

_MAX_SHOWN = 400  # characters of an entry in a message


class ReplayError(MiniVLLMError):
    """The replay did something else than the log says; the message shows both."""


class _LogEnds(Exception):  # noqa: N818 - no error: the recording was stopped in the middle of a step
    """The replay wants what the recording did not come to."""


def main(arguments: Sequence[str], prog: str) -> int:
    """Replay a log. 0: every decision is the same; 1: the first that is not, or no log; 2: bad arguments."""
    parser = argparse.ArgumentParser(prog=prog, description="Runs a recorded engine again, without the model.")
    parser.add_argument("file", type=Path, metavar="FILE", help="of `minivllm serve --record FILE`")
    path = parser.parse_args(arguments).file
    try:
        counts = replay(path)
    except ReplayError as difference:
        print(f"{prog}: {path} {difference}", file=sys.stderr)
        return 1
    print(
        f"{counts['Add']:,} requests, {counts['Abort']:,} aborts, {counts['Step']:,} steps: "
        f"all {counts['Launch']:,} passes are the same"
    )
    return 0


def replay(path: Path) -> Counter[str]:
    """How many entries of each kind agreed. Raises `ReplayError`, or `StartupError` when there is no log."""
    cursor = _Cursor(path)
    engine = _make_engine(cursor)
    try:
        while (entry := cursor.take()) is not None:
            _feed(engine, entry, cursor)
    except _LogEnds:
        return cursor.counts
    except ValueError as error:  # the integrity of the pool
        raise cursor.difference(f"the replay fails: {error}") from error
    engine.check_integrity()
    return cursor.counts


def _feed(engine: EngineCore, entry: Entry, cursor: "_Cursor") -> None:
    match entry:
        case Add(request_id, prompt, output, params):
            try:
                engine.add_request(request_id, prompt, params, output)
            except MiniVLLMError as error:
                raise cursor.difference(f"the replay refuses the request: {error}") from error
        case Abort(request_ids):
            engine.abort(request_ids)
        case Step():
            engine.step()
        case _:
            raise cursor.difference("the replay does nothing here")


class _Cursor:
    """The entries of a log, one after the other, counted."""

    def __init__(self, path: Path) -> None:
        self._entries = self._read(path)
        self._line = 0
        self._last: Entry | None = None
        self._next: Entry | None = None
        self.counts: Counter[str] = Counter()
        self._advance()

    def peek(self) -> Entry | None:
        """What `take` would give."""
        return self._next

    def take(self) -> Entry | None:
        """The next entry; None at the end."""
        self._last = self._next
        if self._last is not None:
            self.counts[type(self._last).__name__] += 1
            self._advance()
        return self._last

    def difference(self, what: str) -> ReplayError:
        """At the entry taken last."""
        line = sum(self.counts.values())
        return ReplayError(f"line {line}: {what}\n  log:    {_show(self._last)}")

    def _advance(self) -> None:
        self._next = next(self._entries, None)

    def _read(self, path: Path) -> Iterator[Entry]:
        decoder = msgspec.json.Decoder(Entry)
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.endswith(b"\n"):
                        return  # written only in part when the engine core died
                    try:
                        yield decoder.decode(line)
                    except msgspec.MsgspecError as error:
                        raise StartupError(f"{path}, line {number}: {error}") from error
        except OSError as error:
            raise StartupError(f"{path}: {error.strerror}") from error


class _ReplayRunner:
    """Stands in for the device: compares what is launched, and gives the tokens of the log."""

    def __init__(self, cursor: _Cursor, block_size: int) -> None:
        self._cursor = cursor
        self._block_size = block_size

    def launch(self, batch: Batch) -> "_ReplayedTokens":
        """Raises `ReplayError`; `MemoryError` where the recorded launch failed."""
        entry, launch = self._take(), Launch.of(batch, self._block_size)
        if entry != launch:
            raise self._cursor.difference(f"the replay decides otherwise\n  replay: {_show(launch)}")
        following = self._cursor.peek()
        if isinstance(following, Fail) and following.at == "launch":
            self._cursor.take()
            raise MemoryError(following.message)
        return _ReplayedTokens(self, len(batch.sampled))

    def release_memory(self) -> None:
        """Nothing to give back."""

    def collect(self, num_sampled: int) -> list[int]:
        """Raises `ReplayError`; `MemoryError` where the recorded pass failed."""
        entry = self._take()
        if isinstance(entry, Fail):
            raise MemoryError(entry.message)
        if not isinstance(entry, Tokens) or len(entry.token_ids) != num_sampled:
            raise self._cursor.difference(f"the replay collects a pass of {num_sampled} tokens here")
        return entry.token_ids

    def _take(self) -> Entry:
        entry = self._cursor.take()
        if entry is None:
            raise _LogEnds
        return entry


@dataclass(slots=True)
class _ReplayedTokens(ModelFreeTokens):
    runner: _ReplayRunner
    num_sampled: int

    def collect(self) -> list[int]:
        return self.runner.collect(self.num_sampled)


def _make_engine(cursor: _Cursor) -> EngineCore:
    header = cursor.take()
    if not isinstance(header, Engine) or header.version != VERSION:
        raise StartupError(f"not a decision log of version {VERSION}: it begins with {_show(header)}")
    config = EngineConfig(
        model="replay",
        max_num_seqs=header.max_num_seqs,
        block_size=header.block_size,
        enable_prefix_caching=header.enable_prefix_caching,
    )

    def load(config: EngineConfig, directory: Path, report: Report) -> Device:
        return model_free_device(
            _ReplayRunner(cursor, header.block_size),
            num_blocks=header.num_blocks,
            block_size=header.block_size,
            max_model_len=header.max_model_len,
            max_num_batched_tokens=header.max_num_batched_tokens,
            depth=header.depth,
            vocab_size=header.vocab_size,
            eos_token_ids=header.eos_token_ids,
        )

    return EngineCore(config, Path(), load=load)


def _show(entry: Any) -> str:
    if entry is None:
        return "the end"
    text = msgspec.json.encode(entry).decode()
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} …"
