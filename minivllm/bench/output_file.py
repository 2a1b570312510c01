"""The file that a benchmark writes its numbers to: looked at before the measurement, written after it."""

import json
from pathlib import Path
from typing import Any

from minivllm.errors import StartupError


def check_output_file(option: str, file: Path | None) -> None:
    """Raises `StartupError` that names the option when `file` could not be made."""
    if file is not None and not file.absolute().parent.is_dir():
        raise StartupError(f"--{option} {file}: no such directory")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Raises `StartupError`."""
    try:
        file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise StartupError(f"--json {file}: {error.strerror}") from error
