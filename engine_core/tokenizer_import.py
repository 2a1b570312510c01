"""Converts a tokenizer of an older format to tokenizer.json: `python -m engine_core.tokenizer_import SOURCE TARGET`.

Frontends read tokenizer.json only. transformers knows the older formats, so it runs once, in a process of its own.
"""

import sys
from pathlib import Path

from transformers import AutoTokenizer


def convert(source: Path, target: Path) -> None:
    """Write the fast form of the tokenizer in `source` into `target`. Raises what transformers raises."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(target)
    if not (target / "tokenizer.json").is_file():
        raise ValueError("this kind of tokenizer cannot be converted; install sentencepiece or use --tokenizer")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
