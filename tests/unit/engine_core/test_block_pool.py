"""Ownership of blocks: references, eviction order, the prefix index, and that misuse and corruption are noticed."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine_core.block_pool import BlockPool


def digest(number: int) -> bytes:
    return bytes([number])


class BlockPoolMachine(RuleBasedStateMachine):
    """Requests as lists of blocks; contents as small numbers, each in at most one block."""

    pool: BlockPool

    @initialize(num_blocks=st.integers(1, 6))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # what each block is registered for
        self.released: list[int] = []  # unreferenced registered blocks, least recently used first

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_unused:
            with pytest.raises(ValueError, match=f"{count} blocks asked for"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & {block for held in self.held for block in held}
        evicted = [block for block in blocks if block in self.content]
        assert evicted == self.released[: len(evicted)], "the least recently used content goes first"
        assert not evicted or len(evicted) == count - self.num_worthless, "worthless blocks go before cached ones"
        self.num_worthless = max(0, self.num_worthless - count)
        self.released = self.released[len(evicted) :]
        for block in evicted:
            del self.content[block]
        self.held.append(blocks)

    num_worthless = 0

    @rule(data=st.data(), number=st.integers(0, 4))
    def register(self, data: st.DataObject, number: int) -> None:
        blocks = sorted({block for held in self.held for block in held})
        if blocks:
            block = data.draw(st.sampled_from(blocks))
            if block not in self.content and digest(number) not in self.content.values():
                self.content[block] = digest(number)
            self.pool.register(block, digest(number))

    @rule(number=st.integers(0, 4))
    def reuse(self, number: int) -> None:
        block = self.pool.lookup(digest(number))
        expected = {content: block for block, content in self.content.items()}
        assert block == expected.get(digest(number))
        if block is not None:
            self.pool.take(block)
            if block in self.released:
                self.released.remove(block)
            self.held.append([block])

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pool.release(blocks)
            for block in reversed(blocks):
                if block in self.content and not any(block in held for held in self.held):
                    self.released.append(block)

    @rule()
    def reset(self) -> None:
        self.pool.reset_prefix_cache()
        self.content.clear()
        self.released.clear()

    @invariant()
    def books_balance(self) -> None:
        references = Counter(block for held in self.held for block in held)
        self.pool.check_integrity(references)
        assert self.pool.num_used == len(references)
        assert self.pool.num_used + self.pool.num_unused == self.pool.num_blocks
        assert self.pool.num_cached == len(self.released)
        self.num_worthless = self.pool.num_unused - len(self.released)


BlockPoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
TestBlockPoolMachine = BlockPoolMachine.TestCase


def test_content_is_lost_only_when_its_block_is_reused() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, digest(1))
    pool.register(second, digest(2))
    pool.release([first, second])  # the tail is dropped first: it is the older of the two
    assert pool.allocate(1) == [second]
    assert pool.lookup(digest(2)) is None
    assert pool.lookup(digest(1)) == first
    pool.release([second])


def test_two_blocks_with_equal_content_keep_the_first() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, digest(1))
    pool.register(second, digest(1))
    assert pool.lookup(digest(1)) == first
    pool.release([first, second])
    assert (pool.num_cached, pool.num_unused) == (1, 2)


def test_releasing_twice_is_noticed() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="block 0 released twice"):
        pool.release(blocks)


@pytest.mark.parametrize("expected", [{}, {0: 2}, {0: 1, 1: 1}])
def test_integrity_names_the_block_whose_references_are_wrong(expected: dict[int, int]) -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    pool.check_integrity({0: 1})
    with pytest.raises(ValueError, match=r"block \d has \d references, \d expected"):
        pool.check_integrity(expected)


def test_integrity_notices_a_broken_free_list_and_a_broken_index() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    pool._unused[0] = None
    with pytest.raises(ValueError, match="free list disagree"):
        pool.check_integrity({0: 1})
    pool = BlockPool(1)
    pool._block_of_hash[digest(1)] = 0
    with pytest.raises(ValueError, match="index and its blocks disagree"):
        pool.check_integrity({})
