"""Finds stop strings in text that arrives in pieces, without ever letting part of one out."""

from collections.abc import Sequence


class StopStringMatcher:
    """Holds back only text that may still become a stop string. `matched` is the one found, or None.

    The stop string that is complete first wins (the longest, if several end together), so the result does not depend
    on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        self._stop = stop
        self._include = include_stop_str_in_output
        self._held = ""
        self._max_held = max(map(len, stop)) - 1
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take more text and return what may be shown of it and of the text held before."""
        text = self._held + text
        ends = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            end, start, self.matched = min(ends)
            self._held = ""
            return text[: end if self._include else start]
        keep = len(text) - self._num_to_hold(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """The text still held, when nothing more will come."""
        text, self._held = self._held, ""
        return text

    def _num_to_hold(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._max_held, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
