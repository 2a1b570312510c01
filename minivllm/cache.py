"""The user's cache directory, and how something expensive gets into it whole, once, whoever dies on the way."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from minivllm.errors import ModelError


def cache_dir() -> Path:
    """$MINIVLLM_CACHE, else $XDG_CACHE_HOME/minivllm, else ~/.cache/minivllm."""
    if directory := os.environ.get("MINIVLLM_CACHE"):
        return Path(directory).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minivllm"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, filled by `build(temporary directory)` unless it is there. Raises `ModelError` on a full disk.

    `target` appears by one rename, so it is whole or absent. A file lock makes parallel callers wait for the first one;
    what a killed one left is swept by the next. The lock dies with its process.
    """
    from filelock import FileLock

    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if target.is_dir():
                return target
            for stale in target.parent.glob(f"{target.name}.tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f"{target.name}.tmp-", dir=target.parent) as temporary:
                result = Path(temporary) / "result"
                result.mkdir()
                build(result)
                result.rename(target)
    except OSError as error:
        raise ModelError(f"cannot write to the cache directory {target.parent}: {error}") from error
    return target


def run_module(module: str, *arguments: str | Path, what: str) -> None:
    """`python -m module arguments` in a subprocess, silent unless it fails: `ModelError` "what: its last line"."""
    command = [sys.executable, "-P", "-m", module, *map(str, arguments)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise ModelError(f"{what}: {lines[-1]}")
