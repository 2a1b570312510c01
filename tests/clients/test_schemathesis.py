"""Requests made up from /openapi.json find no crash and no answer that the document does not describe.

`scripts/test --all` installs schemathesis; without it this test is skipped. The engine core is a fake one: a made-up
chat may fill the context.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_engine import FakeEngine
from tests.unit.frontend.running import RunningFrontend

COMMAND = Path(sys.executable).with_name("schemathesis")
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection,unsupported_method"
)

pytestmark = pytest.mark.skipif(not COMMAND.exists(), reason="schemathesis is not installed (scripts/test --all)")


@pytest.fixture
def frontend(default_model_dir: Path) -> Iterator[RunningFrontend]:
    directory = Path(tempfile.mkdtemp(prefix="mv-"))
    with FakeEngine(directory, vocab_size=49152) as engine:
        engine.tokens_per_step = 64
        with RunningFrontend(directory, default_model_dir) as frontend:
            frontend.wait_until_ready()
            yield frontend
    shutil.rmtree(directory)


def test_nothing_is_found(frontend: RunningFrontend, tmp_path: Path) -> None:
    options = ["--checks", CHECKS, "--max-examples", "20", "--seed", "1", "--request-timeout", "60"]
    options += ["--exclude-path", "/v1/engine/events"]  # a stream without an end
    document = f"{frontend.http.base_url}/openapi.json"
    result = subprocess.run(
        [str(COMMAND), "run", document, *options],
        cwd=tmp_path,  # it leaves files behind
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert frontend.is_idle()
