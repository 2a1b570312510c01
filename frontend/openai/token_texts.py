"""The tokens of one text, one after the other: how each reads and where it stands."""

import codecs

from frontend.token_bytes import TokenBytes

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class TokenTexts:
    """Walks over the tokens of one text. `offset` is the number of characters before the current one.

    skip_special_tokens: special tokens take no room in the text (they can still be read).
    """

    def __init__(self, token_bytes: TokenBytes, skip_special_tokens: bool) -> None:
        self._bytes = token_bytes
        self._skip_special_tokens = skip_special_tokens
        self._at_start = True
        self._utf8 = _Utf8Decoder("replace")
        self.offset = 0

    def piece(self, token_id: int) -> bytes:
        """What `token_id` would add here."""
        return self._bytes.first(token_id) if self._at_start else self._bytes.later[token_id]

    def read(self, token_id: int) -> str:
        """`piece` as text; a part of a character reads as U+FFFD."""
        return self.piece(token_id).decode("utf-8", "replace")

    def step(self, token_id: int) -> None:
        """Go on behind `token_id`."""
        if not self._bytes.skips(token_id, self._skip_special_tokens):
            self.offset += len(self._utf8.decode(self.piece(token_id)))
            self._at_start = False
