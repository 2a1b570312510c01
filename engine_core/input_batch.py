"""What the device knows of each running request, in rows that stay put: the host sends only what changed.

row     │ last_token │ length │ block_table[row] │ temperature … seed │ prompt_mask, output_counts (on demand)
scratch │ one row more, for the padding of captured graphs: a length of 1, a block that nobody owns
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine_core.grammar import GrammarRows, Grammars
from engine_core.request import Request
from engine_core.sampler import SamplingTensors, apply_penalties, sample
from engine_core.scheduler import Batch


class InputBatch:
    """Device-resident rows, one per running request."""

    def __init__(
        self,
        num_rows: int,
        max_blocks: int,
        vocab_size: int,
        scratch_block: int,
        device: torch.device,
        grammars: Grammars,
    ) -> None:
        self.device = device
        self.scratch_row = num_rows
        self._vocab_size = vocab_size
        size = num_rows + 1
        self.last_token = torch.zeros(size, dtype=torch.int64, device=device)
        self.lengths = torch.ones(size, dtype=torch.int64, device=device)  # tokens; the last one is not computed yet
        self.block_table = torch.full((size, max_blocks), scratch_block, dtype=torch.int64, device=device)
        self._num_blocks = [0] * num_rows  # host mirror: entries of block_table that are valid
        self.temperature = torch.zeros(size, device=device)
        self.seed = torch.zeros(size, dtype=torch.int64, device=device)
        self._filters = torch.zeros(size, 3, device=device)  # top_k, top_p, min_p
        self._penalties: _PenaltyRows | None = None
        self._grammars = GrammarRows(grammars, vocab_size)

    def load(self, requests: Sequence[Request]) -> None:
        """Fill the rows that `requests` were given."""
        if not requests:
            return
        rows = self.rows_of(requests)
        self.temperature[rows] = self.to_device([0.0 if r.params.is_greedy else r.params.temperature for r in requests])
        self.seed[rows] = self.to_device([request.seed for request in requests])
        filters = [(max(r.params.top_k, 0), r.params.top_p, r.params.min_p) for r in requests]
        self._filters[rows] = self.to_device(filters).to(torch.float32)
        for request in requests:
            self._num_blocks[request.row] = 0
            self._grammars.load(request)
            if request.params.has_penalties:
                if self._penalties is None:
                    self._penalties = _PenaltyRows(self.scratch_row, self._vocab_size, self.device)
                self._penalties.load(request)

    def grow(self, requests: Sequence[Request]) -> None:
        """Send the blocks that were added to the tables of `requests`."""
        added = []
        for request in requests:
            known, blocks = self._num_blocks[request.row], request.block_table
            added += [(request.row, index, blocks[index]) for index in range(known, len(blocks))]
            self._num_blocks[request.row] = len(blocks)
        if added:
            rows, indices, blocks_added = self.to_device(added).unbind(1)
            self.block_table[rows, indices] = blocks_added

    def release_memory(self) -> None:
        """Give back what was allocated on demand. Only while no request has a row."""
        self._penalties = None

    def rows_of(self, requests: Sequence[Request]) -> Tensor:
        """Row numbers [num_reqs] on the device."""
        return self.to_device([request.row for request in requests])

    def slots(self, rows: Tensor, positions: Tensor, block_size: int) -> Tensor:
        """Slot in the KV pool [n] of each (row, position)."""
        return self.block_table[rows, positions // block_size] * block_size + positions % block_size

    def sample(self, logits: Tensor, batch: Batch, rows: Tensor) -> Tensor:
        """Tokens [num_sampled] from logits [num_sampled, vocab_size]; they become the last tokens of `rows`."""
        tokens = self.choose(logits, batch, rows, self.lengths[rows])
        self.last_token[rows] = tokens
        self.lengths[rows] += 1
        return tokens

    def choose(self, logits: Tensor, batch: Batch, rows: Tensor, positions: Tensor) -> Tensor:
        """Like `sample`, but lengths and last tokens stay; `positions` [num_sampled] are those of the new tokens."""
        logits = self._grammars.apply(self._adjust(logits, batch, rows), batch.sampled)
        tokens = sample(logits, self._tensors(batch.sampled, rows), positions)
        if self._penalties is not None:
            self._penalties.output_counts[rows, tokens] += 1
        return tokens

    def take_failures(self) -> dict[Request, str]:
        """See `GrammarRows`."""
        return self._grammars.take_failures()

    def to_device(self, values: Sequence[object]) -> Tensor:
        """A tensor of `values`, copied without waiting for the device."""
        tensor = torch.tensor(values)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _tensors(self, requests: Sequence[Request], rows: Tensor) -> SamplingTensors | None:
        """Parameters of `requests`; None when all are greedy, single fields None when no request uses them."""
        params = [request.params for request in requests]
        if all(p.is_greedy for p in params):
            return None
        top_k, top_p, min_p = self._filters[rows].unbind(1)
        return SamplingTensors(
            temperature=self.temperature[rows],
            seed=self.seed[rows],
            top_k=top_k.long() if any(p.top_k > 0 for p in params) else None,
            top_p=top_p if any(p.top_p < 1.0 for p in params) else None,
            min_p=min_p if any(p.min_p > 0.0 for p in params) else None,
        )

    def _adjust(self, logits: Tensor, batch: Batch, rows: Tensor) -> Tensor:
        """Apply penalties, logit bias and `min_tokens` where a request asks for it."""
        penalised = [i for i, request in enumerate(batch.sampled) if request.params.has_penalties]
        if penalised and self._penalties is not None:
            logits = self._penalties.apply(logits, self.to_device(penalised), rows)
        changes = [
            (i, token, bias)
            for i, request in enumerate(batch.sampled)
            for token, bias in request.params.logit_bias.items()
        ]
        changes += [
            (i, token, float("-inf"))
            for i, (request, position) in enumerate(zip(batch.sampled, batch.sampled_positions, strict=True))
            if position - request.num_prompt_tokens < request.params.min_tokens and request.params.json_schema is None
            for token in request.stop_token_ids
        ]
        if not changes:
            return logits
        indices, tokens, values = (self.to_device(column) for column in zip(*changes, strict=True))
        return logits.index_put((indices, tokens), values.to(logits.dtype), accumulate=True)


class _PenaltyRows:
    """Token statistics per row, allocated when a request asks for a penalty: num_rows * vocab_size * 5 bytes."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.prompt_mask = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=device)
        self.output_counts = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device)
        self._factors = torch.ones(num_rows, 3, device=device)  # repetition, presence, frequency

    def load(self, request: Request) -> None:
        row, params, device = request.row, request.params, self.prompt_mask.device
        self.prompt_mask[row] = False
        self.prompt_mask[row, torch.tensor(request.prompt_token_ids, device=device)] = True
        output = torch.tensor(request.output_token_ids, dtype=torch.int64, device=device)
        self.output_counts[row] = torch.bincount(output, minlength=self.output_counts.shape[1])
        factors = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self._factors[row] = torch.tensor(factors, device=device)

    def apply(self, logits: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
        """Copy of `logits` with penalties applied at `indices`; `rows` are those of all logits."""
        rows = rows[indices]
        penalised = apply_penalties(
            logits[indices].float(), self.prompt_mask[rows], self.output_counts[rows], *self._factors[rows].unbind(1)
        )
        return logits.index_copy(0, indices, penalised.to(logits.dtype))
