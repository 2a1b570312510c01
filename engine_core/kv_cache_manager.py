"""Which KV cache blocks each request holds: allocate on prefill, append per decode step, share prefixes, free.

tokens       | t0 … t15 | t16 … t31 | t32 … |        block_size = 16
block_table  |    7     |     2     |   9   |        physical blocks, in any order
prefix cache | hash(-,t0…t15) → 7   hash(7's hash, t16…t31) → 2
               a hash names a block's tokens and all tokens before it, so equal hashes mean equal K/V
"""

from array import array
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b

from engine_core.block_pool import BlockPool
from engine_core.request import Request


class KVCacheManager:
    """Block tables over a `BlockPool`. Holds no tensors: K/V live in the `KVPool`, addressed by block number."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self._enable_prefix_caching = enable_prefix_caching
        self.num_prefix_queries = 0  # tokens looked up
        self.num_prefix_hits = 0  # tokens found

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate_prefill(self, request: Request, max_new_tokens: int, reserve: int = 0) -> int:
        """Give `request` blocks for its next prefill chunk of at most `max_new_tokens` tokens.

        At the first chunk cached blocks are taken first and advance `num_computed_tokens`. `reserve` blocks stay
        unused. Returns the number of tokens in the chunk, 0 (and nothing changed) when the blocks do not suffice.
        """
        cached = self._matching_blocks(request) if not request.block_table else []
        num_computed = len(cached) * self.block_size or request.num_computed_tokens
        num_new = min(max_new_tokens, request.num_tokens - num_computed)
        num_missing = self.num_blocks_for(num_computed + num_new) - len(request.block_table) - len(cached)
        num_revived = sum(1 for block in cached if self.pool.is_unused(block))
        if num_missing + num_revived + reserve > self.pool.num_unused:
            return 0
        if not request.block_table:
            self._take_cached(request, cached)
        request.block_table += self.pool.allocate(num_missing)
        return num_new

    def append_slot(self, request: Request) -> bool | None:
        """Make room for the K/V of one more token. True: a block was added; False: none needed; None: none left."""
        if request.num_computed_tokens < len(request.block_table) * self.block_size:
            return False
        if self.pool.num_unused == 0:
            return None
        request.block_table += self.pool.allocate(1)
        return True

    def commit(self, request: Request) -> None:
        """Make the blocks findable that are full, computed, and whose tokens are known on the host."""
        num_full = min(request.num_computed_tokens, len(request.token_ids)) // self.block_size
        if not self._enable_prefix_caching or num_full <= request.num_committed_blocks:
            return
        hashes = self._hashes(request, num_full)
        for index in range(request.num_committed_blocks, num_full):
            self.pool.register(request.block_table[index], hashes[index])
        request.num_committed_blocks = num_full

    def rewind(self, request: Request, num_tokens: int) -> None:
        """Only the K/V of the first `num_tokens` tokens are certain: what follows is not computed and not findable.

        A block may have been committed while the pass that fills its last slot was in flight.
        """
        num_full = num_tokens // self.block_size
        for block in request.block_table[num_full : request.num_committed_blocks]:
            self.pool.forget(block)
        request.num_computed_tokens = num_tokens
        request.num_committed_blocks = min(request.num_committed_blocks, num_full)

    def free(self, request: Request) -> None:
        """Drop all blocks of `request`; what was committed stays findable until it is evicted."""
        self.pool.release(request.block_table)
        request.block_table = []
        request.num_computed_tokens = 0
        request.num_committed_blocks = 0

    def check_integrity(self, live_requests: Iterable[Request]) -> None:
        """Raise `ValueError` unless the pool's references are exactly the block tables of `live_requests`."""
        references: Counter[int] = Counter()
        for request in live_requests:
            references.update(request.block_table)
        self.pool.check_integrity(references)

    def _take_cached(self, request: Request, cached: list[int]) -> None:
        for block in cached:
            self.pool.take(block)
        request.block_table = list(cached)
        request.num_computed_tokens = len(cached) * self.block_size
        request.num_committed_blocks = len(cached)
        if request.num_preemptions == 0:  # a preempted request finding its own blocks again is not a hit
            request.num_cached_tokens = request.num_computed_tokens
            self.num_prefix_queries += request.num_tokens
            self.num_prefix_hits += request.num_computed_tokens

    def _matching_blocks(self, request: Request) -> list[int]:
        if not self._enable_prefix_caching or request.needs_prompt_logits:  # what is found is not computed
            return []
        num_full = (len(request.token_ids) - 1) // self.block_size  # the last token must be computed: it gives logits
        blocks = []
        for block_hash in self._hashes(request, num_full)[:num_full]:
            block = self.pool.lookup(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _hashes(self, request: Request, num_blocks: int) -> list[bytes]:
        hashes = request.block_hashes
        for index in range(len(hashes), num_blocks):
            tokens = request.token_ids[index * self.block_size : (index + 1) * self.block_size]
            parent = hashes[-1] if hashes else b""
            hashes.append(blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest())
        return hashes
