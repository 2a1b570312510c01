"""A tokenizer for a model of random weights that has none: bytes, and a made-up word for every other token id."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def write_stand_in_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write `directory`/tokenizer.json: byte-level, `vocab_size` tokens, at least 256."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"Ġw{token_id}" for token_id in range(len(tokens), vocab_size)]
    tokenizer = Tokenizer(models.BPE({token: token_id for token_id, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
