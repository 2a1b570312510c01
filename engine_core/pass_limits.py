"""How large a pass may be: as large as configured, less after the device ran out of memory, more again with time.

limit   8192 ─ out of memory ─▶ 4096 ─ again ─▶ 2048 ─ 64 good passes ─▶ 4096 ─ out of memory ─▶ 2048 ─ 128 good …

A limit that turns out to have been raised too early doubles the number of good passes the next raise waits for, so
that a lasting shortage costs less and less. Integers only.
"""

FIRST_PATIENCE = 64  # good passes before a limit is raised
MAX_PATIENCE = 4096


class PassLimits:
    """Limits of the next pass: `num_tokens` of a prefill, `num_requests` of a decode.

    The first request of a prefill may always have `smallest_prefill` tokens, or it would never complete a block.
    """

    def __init__(self, max_num_tokens: int, max_num_requests: int, min_num_tokens: int) -> None:
        """`min_num_tokens`: the prefill of a single request is not cut below that."""
        self._max_num_tokens = self.num_tokens = max_num_tokens
        self._max_num_requests = self.num_requests = max_num_requests
        self.smallest_prefill = min(min_num_tokens, max_num_tokens)
        self._patience = FIRST_PATIENCE
        self._num_good = 0  # passes since the last change
        self._was_raised = False  # by the last change

    @property
    def are_reduced(self) -> bool:
        return self.num_tokens < self._max_num_tokens or self.num_requests < self._max_num_requests

    def shrink_prefill(self, num_tokens: int, num_requests: int) -> bool:
        """A prefill of that size did not fit: allow half. False, and no change, when it cannot be smaller."""
        smallest = self.smallest_prefill if num_requests == 1 else 1
        if num_tokens <= smallest:
            return False
        self.num_tokens = min(self.num_tokens, max(num_tokens // 2, smallest))
        self._lose_confidence()
        return True

    def shrink_decode(self, num_requests: int) -> bool:
        """A decode of that size did not fit: allow half. False, and no change, when it cannot be smaller."""
        if num_requests == 1:
            return False
        self.num_requests = min(self.num_requests, num_requests // 2)
        self._lose_confidence()
        return True

    def pass_done(self) -> None:
        """A pass succeeded. Enough of them in a row, and the limits double."""
        self._num_good += 1
        if self._num_good < self._patience:
            return
        self._num_good = 0
        self._was_raised = self.are_reduced
        if self.are_reduced:
            self.num_tokens = min(self._max_num_tokens, 2 * self.num_tokens)
            self.num_requests = min(self._max_num_requests, 2 * self.num_requests)
        else:
            self._patience = FIRST_PATIENCE

    def _lose_confidence(self) -> None:
        if self._was_raised:
            self._patience = min(MAX_PATIENCE, 2 * self._patience)
        self._num_good = 0
        self._was_raised = False
