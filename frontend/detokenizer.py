"""Token ids → text while they are being generated: never half a character, never part of a stop string."""

import codecs
from collections.abc import Sequence
from itertools import islice

from frontend.stop_strings import StopStringMatcher
from frontend.tokenizer import Tokenizer
from minivllm.sampling_params import SamplingParams

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """The text of one request. All deltas joined equal the tokenizer's decode of all ids (up to the stop string).

    At most the three bytes of an unfinished character are held, so undecodable output costs no more than text: it
    appears as U+FFFD at once. (Where byte-fallback tokens form no character, tokenizers' own decode replaces the whole
    run of byte tokens; here the characters of the run that are complete survive.)

    stopped: a stop string was found. num_tokens: ids that count as output; those after the stop string do not.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._bytes = tokenizer.token_bytes
        self._pieces = self._bytes.later_no_special if params.skip_special_tokens else self._bytes.later
        self._params = params
        self._texts = self._bytes.texts_no_special if params.skip_special_tokens else self._bytes.texts
        self._utf8 = _Utf8Decoder("replace")
        self._at_start = True
        self._is_mid_character = False
        include = params.include_stop_str_in_output
        self._matcher = StopStringMatcher(params.stop, include) if params.stop else None
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        return self._matcher is not None and self._matcher.matched is not None

    def add(self, token_ids: Sequence[int], stop_token_id: int | None = None) -> str:
        """The text that is now certain. A last id equal to `stop_token_id` ended the request and shows no text."""
        shown = len(token_ids)
        if stop_token_id is not None and token_ids and token_ids[-1] == stop_token_id:
            shown -= not self._params.include_stop_str_in_output
        if self._matcher is None:
            self.num_tokens += len(token_ids)
            return self._decode(token_ids if shown == len(token_ids) else token_ids[:shown])
        text = self._add_until_stop(self._matcher, islice(token_ids, shown))
        self.num_tokens += 0 if self.stopped else len(token_ids) - shown
        return text

    def finish(self) -> str:
        """The rest of the text, when no more ids will come."""
        if self.stopped:
            return ""
        text = self._utf8.decode(b"", True)
        return text if self._matcher is None else self._matcher.push(text) + self._matcher.flush()

    def _add_until_stop(self, matcher: StopStringMatcher, token_ids: "islice[int]") -> str:
        """One token at a time, so that `num_tokens` is the same however the ids were bundled."""
        text = []
        for token_id in token_ids:
            if matcher.matched is not None:
                break
            self.num_tokens += 1
            delta = self._decode((token_id,))
            text.append(delta if self.num_tokens <= self._params.min_tokens else matcher.push(delta))
        return "".join(text)

    def _decode(self, token_ids: Sequence[int]) -> str:
        if self._at_start:
            return self._decode_start(token_ids)
        if len(token_ids) == 1 and not self._is_mid_character:  # nearly always
            text = self._texts[token_ids[0]]
            if text is not None:
                return text
        pieces = self._pieces
        return self._decode_bytes(b"".join([pieces[token_id] for token_id in token_ids]))

    def _decode_bytes(self, piece: bytes) -> str:
        text = self._utf8.decode(piece)
        self._is_mid_character = bool(self._utf8.getstate()[0])
        return text

    def _decode_start(self, token_ids: Sequence[int]) -> str:
        """Skip what decode skips, then take the first token's own piece."""
        for i, token_id in enumerate(token_ids):
            if not self._bytes.skips(token_id, self._params.skip_special_tokens):
                self._at_start = False
                return self._decode_bytes(self._bytes.first(token_id)) + self._decode(token_ids[i + 1 :])
        return ""
