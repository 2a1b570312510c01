"""The JavaScript clients. `scripts/test --all` installs them; without them these tests are skipped."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent / "js"

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or not (SCRIPTS / "node_modules").is_dir(),
    reason="the JavaScript clients are not installed (scripts/test --all)",
)


def run(script: str, base_url: str) -> Any:
    """What the script prints."""
    result = subprocess.run(
        ["node", str(SCRIPTS / script), base_url], capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_openai(base_url: str) -> None:
    said = run("openai.mjs", base_url)
    assert said["model"] == "smol"
    assert "Paris" in said["whole"]
    assert said["whole"] == said["streamed"] == said["final"]
    assert said["usage"]["completion_tokens"] > 0
    assert said["text"]
    assert said["error"] == {"status": 404, "code": "model_not_found", "name": "NotFoundError"}


def test_the_ai_sdk(base_url: str) -> None:
    said = run("ai_sdk.mjs", base_url)
    assert "Paris" in said["whole"]
    assert said["whole"] == said["streamed"]
    assert said["finishReason"] == "stop"
    assert said["usage"]["outputTokens"] > 0
