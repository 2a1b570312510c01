"""One forward pass: pack the batch, run the model, sample. Prefill and decode are two different kinds of pass.

    launch(batch) ── run_prefill | run_decode ──▶ tokens stay on the device ──▶ SampledTokens.collect() reads them
                     no synchronisation here                                    the only one, once a pass

On a GPU a decode pass is one CUDA graph from last tokens to new tokens (`cuda_runner`), on a CPU compiled code replaces
most of the model's own (`cpu_runner`); here the model is called as it is.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine_core.attention.paged import AttentionMetadata
from engine_core.attention.torch_backend import DecodeMetadata, PrefillMetadata, PrefillSpan
from engine_core.grammar import Grammars
from engine_core.input_batch import InputBatch
from engine_core.kv_pool import KVPool
from engine_core.logprobs import LogprobTensors, log_probabilities, most_alternatives, prompt_spans, sampled_spans
from engine_core.model_loader import LoadedModel
from engine_core.prefill_inputs import PrefillInputs
from engine_core.request import Request
from engine_core.scheduler import Batch
from minivllm.protocol import Logprobs


@dataclass(slots=True)
class SampledTokens:
    """Tokens of a launched pass and what was asked about them, on their way to the host."""

    tokens: Tensor | None  # [num_sampled], on the CPU once `event` has happened
    event: torch.cuda.Event | None = None
    logprobs: LogprobTensors | None = None  # of `Batch.with_logprobs`, likewise
    prompt_logprobs: LogprobTensors | None = None  # of `Batch.prompt_spans`, likewise
    failures: Mapping[Request, str] = field(default_factory=dict)  # whose token is void, and why

    def collect(self) -> list[int]:
        """Wait for the device, then one id per request of `Batch.sampled`."""
        if self.event is not None:
            self.event.synchronize()
        return [] if self.tokens is None else self.tokens.tolist()

    def read_logprobs(self, batch: Batch) -> dict[Request, Logprobs]:
        """Log-probabilities of the sampled tokens of those that ask. After `collect`."""
        return {} if self.logprobs is None else dict(self.logprobs.read(sampled_spans(batch)))

    def read_prompt_logprobs(self, batch: Batch) -> dict[Request, Logprobs]:
        """Log-probabilities of prompt tokens that this pass brought. After `collect`."""
        return {} if self.prompt_logprobs is None else dict(self.prompt_logprobs.read(prompt_spans(batch)))


class ModelRunner:
    """Runs batches of the scheduler on the model. Knows rows, blocks and tensors, but no queue and no policy."""

    def __init__(
        self, loaded: LoadedModel, pool: KVPool, max_num_seqs: int, max_model_len: int, grammars: Grammars
    ) -> None:
        self.model = loaded.model
        self.pool = pool
        self.device = loaded.device
        max_blocks = -(-max_model_len // pool.block_size)
        self.rows = InputBatch(max_num_seqs, max_blocks, loaded.vocab_size, pool.scratch_block, loaded.device, grammars)
        pool.attach(loaded.layers)

    def warm_up(self, report: Callable[[str], None]) -> None:
        """Do now what would make the first requests slow; `report` is told what goes on."""

    def release_memory(self) -> None:
        """Give back all memory that was allocated on demand. Only while no request runs."""
        self.rows.release_memory()
        gc.collect()  # tensors in reference cycles, if a library left any

    @torch.inference_mode()
    def launch(self, batch: Batch) -> SampledTokens:
        """Start `batch` on the device and return without waiting for it."""
        self.rows.load(batch.started)
        self.rows.grow(batch.grown)
        return self.run_prefill(batch) if batch.kind == "prefill" else self.run_decode(batch)

    @torch.inference_mode()
    def run_prefill(self, batch: Batch) -> SampledTokens:
        """Compute the chunks of `batch`; token ids [num_sampled] of the prompts that are complete, if any."""
        inputs = PrefillInputs.pack(batch, self.pool.block_size)
        input_ids, positions, slots = torch.from_numpy(inputs.tokens)
        spans, end = [], 0
        for request, start, count in zip(batch.requests, batch.starts, batch.counts, strict=True):
            begin, end = end, end + count
            spans.append(PrefillSpan(begin, end, start, start + count, self.rows.block_table[request.row]))
        metadata = self._prefill_metadata(slots, spans)
        logits = self.forward(input_ids, positions, metadata, torch.tensor(inputs.logits_index))
        prompt_logprobs = self._prompt_logprobs(logits, inputs, batch)
        if not batch.sampled:
            return SampledTokens(None, prompt_logprobs=prompt_logprobs)
        rows, logits = self.rows.rows_of(batch.sampled), logits[: len(batch.sampled)]
        self.rows.lengths[rows] = torch.tensor(batch.sampled_positions)
        return self._sampled(logits, self.rows.sample(logits, batch, rows), batch, prompt_logprobs)

    @torch.inference_mode()
    def run_decode(self, batch: Batch) -> SampledTokens:
        """One token for every request of `batch`: token ids [num_reqs]."""
        rows = self.rows.rows_of(batch.requests)
        positions = self.rows.lengths[rows] - 1
        metadata = self._decode_metadata(rows, positions, [start + 1 for start in batch.starts])
        logits = self.forward(self.rows.last_token[rows], positions, metadata)
        return self._sampled(logits, self.rows.sample(logits, batch, rows), batch)

    def _prefill_metadata(self, slots: Tensor, spans: list[PrefillSpan]) -> AttentionMetadata:
        return PrefillMetadata(slots, self.pool.block_size, spans)

    def _decode_metadata(self, rows: Tensor, positions: Tensor, context_lens: list[int]) -> AttentionMetadata:
        slots = self.rows.slots(rows, positions, self.pool.block_size)
        return DecodeMetadata(slots, self.pool.block_size, self.rows.block_table[rows], context_lens)

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

    def _sampled(
        self, logits: Tensor, tokens: Tensor, batch: Batch, prompt_logprobs: LogprobTensors | None = None
    ) -> SampledTokens:
        """`tokens` [num_sampled], with log-probabilities under `logits` [num_sampled, vocab_size] for those who ask."""
        logprobs = None
        if batch.with_logprobs:
            index = self.rows.to_device(batch.with_logprobs)
            logprobs = log_probabilities(logits[index], tokens[index], most_alternatives(sampled_spans(batch)))
        failures = self.rows.take_failures()
        return SampledTokens(tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, failures=failures)

    def _prompt_logprobs(self, logits: Tensor, inputs: PrefillInputs, batch: Batch) -> LogprobTensors | None:
        """Of the prompt tokens judged in this pass; `logits` are those at `inputs.logits_index`."""
        if not batch.prompt_spans:
            return None
        targets = self.rows.to_device(inputs.prompt_targets)
        return log_probabilities(logits[-len(targets) :], targets, most_alternatives(prompt_spans(batch)))
