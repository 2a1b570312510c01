"""What each token adds to the text, in bytes: the one table that makes incremental detokenizing exact and cheap.

A tokenizer's decoder turns a list of tokens into text. For every decoder accepted here the bytes of one token depend
only on whether it is the first, so the text of a growing list is the UTF-8 decoding of the concatenated pieces.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tokenizers

from minivllm.errors import ModelError

_BYTE_LEVEL = {"ByteLevel", "Fuse"}
_PIECEWISE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


_Piece = TypeVar("_Piece")


class PieceTable(dict[int, _Piece]):
    """Token id → what it adds, computed when first asked for."""

    def __init__(self, compute: Callable[[int], _Piece]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, token_id: int) -> _Piece:
        piece = self[token_id] = self._compute(token_id)
        return piece


class TokenBytes:
    """The pieces of one tokenizer. Raises `ModelError` for a decoder whose pieces depend on more than the position.

    later: pieces of tokens after the first; later_no_special: the same, with nothing for special tokens.
    texts, texts_no_special: the same as text, None where the bytes are not whole characters.
    Ids without a token (padding of the vocabulary) have an empty piece, as in the tokenizer's own decode.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        steps = list(_decoder_steps(tokenizer.decoder))
        kinds = {step["type"] for step in steps}
        self._has_byte_tokens = "ByteFallback" in kinds
        if kinds and kinds <= _BYTE_LEVEL:
            self._byte_of_char = _byte_level_alphabet()
            self.later = PieceTable(self._byte_level_piece)
            self._first: PieceTable[bytes] = self.later
        elif kinds <= _PIECEWISE and not any(step.get("stop") for step in steps):
            self._anchor, self._anchor_text = self._find_anchor()
            self.later = PieceTable(self._later_piece)
            self._first = PieceTable(self._first_piece)
        else:
            raise ModelError(f"the tokenizer's decoder ({', '.join(sorted(kinds))}) cannot be streamed")
        self.later_no_special = PieceTable(lambda token: b"" if token in self._special_ids else self.later[token])
        self.texts = PieceTable(lambda token: _text(self.later[token]))
        self.texts_no_special = PieceTable(lambda token: _text(self.later_no_special[token]))

    def skips(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether decode leaves this id out altogether."""
        return (skip_special_tokens and token_id in self._special_ids) or self._token(token_id) is None

    def first(self, token_id: int) -> bytes:
        """The piece of a token that begins the text: many decoders drop its leading space."""
        return self._first[token_id]

    def _token(self, token_id: int) -> str | None:
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def _byte_level_piece(self, token_id: int) -> bytes:
        token = self._token(token_id)
        if token is None:
            return b""
        try:
            return bytes([self._byte_of_char[char] for char in token])
        except KeyError:  # an added token written with characters outside the byte alphabet stands for itself
            return token.encode()

    def _byte_token(self, token_id: int) -> bytes | None:
        match = _BYTE_TOKEN.fullmatch(self._token(token_id) or "") if self._has_byte_tokens else None
        return bytes.fromhex(match[1]) if match else None

    def _later_piece(self, token_id: int) -> bytes:
        byte = self._byte_token(token_id)
        if byte is not None:
            return byte
        return self._decode([self._anchor, token_id])[len(self._anchor_text) :].encode()

    def _first_piece(self, token_id: int) -> bytes:
        text = self._decode([token_id])
        return (self._byte_token(token_id) or text.encode()) if text else b""

    def _find_anchor(self) -> tuple[int, str]:
        """A plain token to decode others behind."""
        for token_id in range(self._tokenizer.get_vocab_size(with_added_tokens=True)):
            token = self._token(token_id)
            if token and token[-1].isalnum() and token_id not in self._special_ids:
                return token_id, self._decode([token_id])
        raise ModelError("the tokenizer has no token that ends in a letter")


def _text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _decoder_steps(decoder: Any) -> Iterator[dict[str, Any]]:
    """The elementary decoders, in order; none for a tokenizer that joins its tokens with spaces."""

    def flatten(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if step["type"] == "Sequence":
            for inner in step["decoders"]:
                yield from flatten(inner)
        else:
            yield step

    if decoder is not None:
        yield from flatten(json.loads(decoder.__getstate__()))


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character → byte: printable bytes stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
