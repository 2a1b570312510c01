"""What a prefill pass needs from the host, packed into a few arrays so that few copies cross the bus."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine_core.scheduler import Batch

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class PrefillInputs:
    """The packed tokens of all chunks."""

    tokens: Ints  # [3, num_tokens]: token id, position, slot in the KV pool
    last_index: list[int]  # where the last token of each complete prompt stands in the pass
    prompt_index: list[int]  # where the tokens stand whose logits judge a token of `Batch.prompt_spans` …
    prompt_targets: list[int]  # … and the ids of those

    @property
    def logits_index(self) -> list[int]:
        """Where logits are needed: `last_index`, then `prompt_index`; never nowhere, so that all passes look alike."""
        return self.last_index + self.prompt_index or [0]

    @classmethod
    def pack(cls, batch: Batch, block_size: int) -> "PrefillInputs":
        """Concatenate the chunks of `batch`."""
        tokens = np.empty((3, batch.num_tokens), dtype=np.int64)
        inputs, end = cls(tokens, [], [], []), 0
        spans = {span.request: span for span in batch.prompt_spans}
        for request, start, count in zip(batch.requests, batch.starts, batch.counts, strict=True):
            begin, end = end, end + count
            positions = np.arange(start, start + count)
            tokens[0, begin:end] = request.token_ids[start : start + count]
            tokens[1, begin:end] = positions
            blocks = np.array(request.block_table, dtype=np.int64)
            tokens[2, begin:end] = blocks[positions // block_size] * block_size + positions % block_size
            if start + count == len(request.token_ids):
                inputs.last_index.append(end - 1)
            if request in spans:
                _, first, num_judged = spans[request]
                inputs.prompt_index += range(begin, begin + num_judged)
                inputs.prompt_targets += request.token_ids[first : first + num_judged]
        return inputs
