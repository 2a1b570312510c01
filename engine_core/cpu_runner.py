"""The model runner of a CPU in float32: compiled attention, and where the layers are standard the rest, too."""

from collections.abc import Callable

from torch import Tensor

from engine_core.attention.cpu_attention import CpuAttention
from engine_core.attention.cpu_decode import CpuDecode, compile_now
from engine_core.attention.cpu_prefill import CpuPrefill
from engine_core.attention.paged import AttentionMetadata
from engine_core.attention.torch_backend import PrefillSpan
from engine_core.cpu_decoder import CpuDecoder, find_cpu_decoder
from engine_core.grammar import Grammars
from engine_core.kv_pool import KVPool
from engine_core.model_loader import LoadedModel
from engine_core.model_runner import ModelRunner


class CpuRunner(ModelRunner):
    """Calls the model's own code until `warm_up` has found that it is a standard decoder."""

    def __init__(
        self, loaded: LoadedModel, pool: KVPool, max_num_seqs: int, max_model_len: int, grammars: Grammars
    ) -> None:
        super().__init__(loaded, pool, max_num_seqs, max_model_len, grammars)
        self._loaded = loaded
        self._decoder: CpuDecoder | None = None

    def warm_up(self, report: Callable[[str], None]) -> None:
        """Compile, which takes some 20 seconds the first time on a machine."""
        report("compiling the attention")
        compile_now()
        report("compiling the decoder layer")
        self._decoder = find_cpu_decoder(self._loaded, self.pool)
        if self._decoder is None:
            report("not a decoder of the standard kind: its own code runs, uncompiled")

    def forward(
        self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, logits_index: Tensor | None = None
    ) -> Tensor:
        """See `ModelRunner`."""
        if self._decoder is None or not isinstance(metadata, CpuAttention):
            return super().forward(input_ids, positions, metadata, logits_index)
        return self._decoder.logits(input_ids, positions, metadata, logits_index)

    def _prefill_metadata(self, slots: Tensor, spans: list[PrefillSpan]) -> AttentionMetadata:
        return CpuPrefill(slots, spans)

    def _decode_metadata(self, rows: Tensor, positions: Tensor, context_lens: list[int]) -> AttentionMetadata:
        slots = self.rows.slots(rows, positions, self.pool.block_size)
        return CpuDecode(slots, self.rows.block_table[rows], context_lens)
