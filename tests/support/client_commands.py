"""Clients that are commands: where `scripts/test --all` installs them, and how a test runs one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

_PLACES = (Path(sys.executable).parent, Path(sys.prefix) / "clients" / "bin")  # the second is for those with pins


def find_command(name: str) -> str | None:
    """Path of an installed client, if it is."""
    return next((path for place in _PLACES if (path := shutil.which(name, path=place))), shutil.which(name))


def run_command(name: str, *arguments: str, cwd: Path, home: Path) -> None:
    """Run a client to its good end. It keeps what it downloads or caches in `home`, and may download nothing."""
    command = find_command(name)
    assert command is not None
    cache = {"HF_HOME": str(home), "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    result = subprocess.run(
        [command, *arguments],
        cwd=cwd,
        env={**os.environ, **cache, "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
