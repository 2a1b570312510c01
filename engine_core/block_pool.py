"""Who owns which KV cache block: free list, reference counts and the prefix cache's index. Integers only, no tensors.

every block is   used    referred to by one or more live requests
                 cached  unreferenced, content findable by hash; evicted least recently used first
                 free    unreferenced, content worthless
"""

from collections import OrderedDict
from collections.abc import Collection


class BlockPool:
    """Reference-counted blocks 0 … num_blocks-1. Raises `ValueError` when it is misused (a bug, never a load)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # free first, then cached by age

    @property
    def num_unused(self) -> int:
        """Blocks that can be allocated now: free and cached ones."""
        return len(self._unused)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._unused)

    @property
    def findable(self) -> Collection[int]:
        """Blocks whose content can be found again, whether they are used or cached."""
        return self._block_of_hash.values()

    @property
    def num_cached(self) -> int:
        return sum(1 for block in self._block_of_hash.values() if self._ref_counts[block] == 0)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; cached content is evicted only when nothing else is left."""
        if count > len(self._unused):
            raise ValueError(f"{count} blocks asked for, {len(self._unused)} unused")
        blocks = [self._unused.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.forget(block)
            self._ref_counts[block] = 1
        return blocks

    def lookup(self, block_hash: bytes) -> int | None:
        """The block that holds this content, or None. Takes no reference."""
        return self._block_of_hash.get(block_hash)

    def is_unused(self, block: int) -> bool:
        return self._ref_counts[block] == 0

    def take(self, block: int) -> None:
        """One more reference to a block found by `lookup`."""
        if self._ref_counts[block] == 0:
            del self._unused[block]
        self._ref_counts[block] += 1

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a full, computed block findable. Keeps the first block when two hold the same content."""
        if block_hash not in self._block_of_hash and self._hashes[block] is None:
            self._hashes[block] = block_hash
            self._block_of_hash[block_hash] = block

    def release(self, blocks: list[int]) -> None:
        """Drop one reference to each block of a request, last block first: prefixes are shared more than tails."""
        for block in reversed(blocks):
            if self._ref_counts[block] <= 0:
                raise ValueError(f"block {block} released twice")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._unused[block] = None
                if self._hashes[block] is None:
                    self._unused.move_to_end(block, last=False)

    def forget(self, block: int) -> None:
        """Make the content of `block` unfindable; references stay."""
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._block_of_hash[block_hash]
            self._hashes[block] = None

    def reset_prefix_cache(self) -> None:
        """Forget all cached content; references stay."""
        for block in list(self._block_of_hash.values()):
            self.forget(block)

    def check_integrity(self, expected_ref_counts: dict[int, int]) -> None:
        """Raise `ValueError` unless references, free list and index agree with the tables of all live requests."""
        for block, count in enumerate(self._ref_counts):
            expected = expected_ref_counts.get(block, 0)
            if count != expected:
                raise ValueError(f"block {block} has {count} references, {expected} expected")
            if (count == 0) != (block in self._unused):
                raise ValueError(f"block {block} with {count} references and the free list disagree")
        index = {block: block_hash for block_hash, block in self._block_of_hash.items()}
        hashes = {block: block_hash for block, block_hash in enumerate(self._hashes) if block_hash is not None}
        if index != hashes:
            raise ValueError("the prefix cache's index and its blocks disagree")
