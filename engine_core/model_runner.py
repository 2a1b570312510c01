"""One forward pass: pack the batch, run the model, sample. Prefill and decode are two different kinds of pass.

    launch(batch) ── run_prefill | run_decode ──▶ tokens stay on the device ──▶ SampledTokens.collect() reads them
                     no synchronisation here                                    the only one, once a pass

On a GPU a decode pass is one CUDA graph from last tokens to new tokens; elsewhere the same model is called directly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine_core.attention.paged import AttentionMetadata
from engine_core.attention.torch_backend import DecodeMetadata, PrefillMetadata, PrefillSpan
from engine_core.input_batch import InputBatch
from engine_core.kv_pool import KVPool
from engine_core.model_loader import LoadedModel
from engine_core.prefill_inputs import PrefillInputs
from engine_core.scheduler import Batch


@dataclass(slots=True)
class SampledTokens:
    """Tokens of a launched pass, on their way to the host."""

    tokens: Tensor | None  # [num_sampled], on the CPU once `event` has happened
    event: torch.cuda.Event | None = None

    def collect(self) -> list[int]:
        """Wait for the device, then one id per request of `Batch.sampled`."""
        if self.event is not None:
            self.event.synchronize()
        return [] if self.tokens is None else self.tokens.tolist()


class ModelRunner:
    """Runs batches of the scheduler on the model. Knows rows, blocks and tensors, but no queue and no policy."""

    def __init__(self, loaded: LoadedModel, pool: KVPool, max_num_seqs: int, max_model_len: int) -> None:
        self.model = loaded.model
        self.pool = pool
        self.device = loaded.device
        max_blocks = -(-max_model_len // pool.block_size)
        self.rows = InputBatch(max_num_seqs, max_blocks, loaded.vocab_size, pool.scratch_block, loaded.device)
        pool.attach(loaded.layers)

    def warm_up(self, report: Callable[[str], None]) -> None:
        """Do now what would make the first requests slow. Nothing here; see `CudaRunner`."""

    @torch.inference_mode()
    def launch(self, batch: Batch) -> SampledTokens:
        """Start `batch` on the device and return without waiting for it."""
        self.rows.load(batch.started)
        self.rows.grow(batch.grown)
        return SampledTokens(self.run_prefill(batch) if batch.kind == "prefill" else self.run_decode(batch))

    @torch.inference_mode()
    def run_prefill(self, batch: Batch) -> Tensor | None:
        """Compute the chunks of `batch`; token ids [num_sampled] of the prompts that are complete, or None."""
        inputs = PrefillInputs.pack(batch, self.pool.block_size)
        input_ids, positions, slots = torch.from_numpy(inputs.tokens)
        spans, end = [], 0
        for request, start, count in zip(batch.requests, batch.starts, batch.counts, strict=True):
            begin, end = end, end + count
            spans.append(PrefillSpan(begin, end, start, start + count, self.rows.block_table[request.row]))
        metadata = PrefillMetadata(slots, self.pool.block_size, spans)
        logits = self.forward(input_ids, positions, metadata, torch.tensor(inputs.last_index or [0]))
        if not batch.sampled:
            return None
        rows = self.rows.rows_of(batch.sampled)
        self.rows.lengths[rows] = torch.tensor(batch.sampled_positions)
        return self.rows.sample(logits, batch, rows)

    @torch.inference_mode()
    def run_decode(self, batch: Batch) -> Tensor:
        """One token for every request of `batch`: token ids [num_reqs]."""
        rows = self.rows.rows_of(batch.requests)
        positions = self.rows.lengths[rows] - 1
        metadata = DecodeMetadata(
            slot_mapping=self.rows.slots(rows, positions, self.pool.block_size),
            block_size=self.pool.block_size,
            block_tables=self.rows.block_table[rows],
            context_lens=[start + 1 for start in batch.starts],
        )
        logits = self.forward(self.rows.last_token[rows], positions, metadata)
        return self.rows.sample(logits, batch, rows)

    def forward(
        self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, logits_index: Tensor | None = None
    ) -> Tensor:
        """Logits [num_logits, vocab_size] of packed tokens [num_tokens], at `logits_index` (None: of all)."""
        self.pool.context.metadata = metadata
        output = self.model(
            input_ids=input_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if logits_index is None else logits_index,
        )
        logits: Tensor = output.logits[0]
        return logits
