"""Text that grows token by token equals text decoded at once, whatever the tokenizer and however ids are bundled."""

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from frontend.detokenizer import IncrementalDetokenizer
from frontend.tokenizer import Tokenizer
from minivllm.errors import ModelError
from minivllm.sampling_params import SamplingParams
from tests.unit.frontend.conftest import byte_level, sentencepiece

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.sampled_from("hello wörld,日本語é😀🎉�\n\t stopend"), max_size=30)


REPLACEMENT = sentencepiece().token_to_id("�") or 0


def detokenize(tokenizer: Tokenizer, token_ids: list[int], sizes: list[int], params: SamplingParams) -> list[str]:
    """Deltas for ids that arrive in bundles of `sizes`, then of one."""
    detokenizer, deltas, start = IncrementalDetokenizer(tokenizer, params), [], 0
    for size in [*sizes, *[1] * len(token_ids)]:
        deltas.append(detokenizer.add(token_ids[start : start + size]))
        start += size
    return [*deltas, detokenizer.finish()]


@quick
@given(text=texts, sizes=st.lists(st.integers(0, 5), max_size=5))
def test_deltas_join_to_the_decoded_text(any_tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    token_ids = any_tokenizer.encode(text, add_special_tokens=False)
    deltas = detokenize(any_tokenizer, token_ids, sizes, SamplingParams())
    assert "".join(deltas) == any_tokenizer.decode(token_ids)


@quick
@given(data=st.data(), skip_special_tokens=st.booleans())
def test_random_ids_join_to_the_decoded_text(
    any_tokenizer: Tokenizer, data: st.DataObject, skip_special_tokens: bool
) -> None:
    is_byte = [any_tokenizer._backend.id_to_token(i) for i in range(min(any_tokenizer.vocab_size, 3000))]
    ids = [i for i, token in enumerate(is_byte) if token and not token.startswith("<0x")]
    token_ids = data.draw(st.lists(st.sampled_from([*ids, any_tokenizer.vocab_size + 7]), max_size=12))
    params = SamplingParams(skip_special_tokens=skip_special_tokens)
    deltas = detokenize(any_tokenizer, token_ids, [], params)
    assert "".join(deltas) == any_tokenizer.decode(token_ids, skip_special_tokens)


@pytest.mark.parametrize("backend", [byte_level, sentencepiece])
def test_half_a_character_is_never_shown(backend: object) -> None:
    tokenizer = Tokenizer(backend(), {})  # type: ignore[operator]
    token_ids = tokenizer.encode("🦜🦜", add_special_tokens=False)
    assert len(token_ids) >= 6, "a parrot must be split into several tokens"
    deltas = detokenize(tokenizer, token_ids, [], SamplingParams())
    assert [delta for delta in deltas if delta.strip()] == ["🦜", "🦜"]


@pytest.mark.parametrize("backend", [byte_level, sentencepiece])
def test_an_unfinished_character_appears_at_the_end(backend: object) -> None:
    tokenizer = Tokenizer(backend(), {})  # type: ignore[operator]
    token_ids = tokenizer.encode("a🦜", add_special_tokens=False)[:-1]
    deltas = detokenize(tokenizer, token_ids, [], SamplingParams())
    assert "�" not in "".join(deltas[:-1])
    assert set(deltas[-1]) == {"�"}


@pytest.mark.parametrize("backend", [byte_level, sentencepiece])
def test_undecodable_runs_are_not_held(backend: object) -> None:
    tokenizer = Tokenizer(backend(), {})  # type: ignore[operator]
    continuation = tokenizer.encode("🦜", add_special_tokens=False)[-1]
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams())
    assert [detokenizer.add([continuation]) for _ in range(2000)] == ["�"] * 2000


def test_a_real_replacement_character_is_shown_at_once() -> None:
    tokenizer = Tokenizer(sentencepiece(), {})
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams())
    assert detokenizer.add([REPLACEMENT]) == "�"


def test_complete_characters_survive_beside_malformed_bytes() -> None:
    tokenizer = Tokenizer(sentencepiece(), {})
    good, bad = tokenizer.encode("😀", add_special_tokens=False)[1:], 3 + 0xFF
    assert "".join(detokenize(tokenizer, [*good, bad, *good], [], SamplingParams())) == "😀�😀"


def test_the_stop_token_shows_no_text(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("hello stop")
    hidden = IncrementalDetokenizer(tokenizer, SamplingParams())
    shown = IncrementalDetokenizer(tokenizer, SamplingParams(include_stop_str_in_output=True))
    assert hidden.add(token_ids, token_ids[-1]) == tokenizer.decode(token_ids[:-1])
    assert shown.add(token_ids, token_ids[-1]) == "hello stop"
    assert hidden.num_tokens == shown.num_tokens == len(token_ids)


def test_a_decoder_that_cannot_be_streamed_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoders.BPEDecoder()
    with pytest.raises(ModelError, match="BPEDecoder"):
        Tokenizer(backend, {})
