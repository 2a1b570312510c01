"""`python -m minivllm.bench.offline.loading CONFIG DIRECTORY`: loads an engine core as `python -m engine_core` does.

Prints each stage as it begins; `READY` when it could serve, and `FIRST_TOKEN` when it has served: ready means ready.
"""

import re
import sys
from pathlib import Path

from minivllm.config import EngineConfig
from minivllm.errors import StartupError

READY = "ready"
FIRST_TOKEN = "first token"  # noqa: S105


def main(config: EngineConfig, directory: Path) -> None:
    """Raises `StartupError`."""
    _report("importing torch and transformers")
    from engine_core.lean_imports import import_transformers

    import_transformers()
    from engine_core.engine import EngineCore
    from minivllm.sampling_params import SamplingParams

    engine = EngineCore(config, directory, _report)
    _report(READY)
    engine.add_request("first", [1, 2, 3], SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=2))
    while not engine.step():
        pass
    _report(FIRST_TOKEN)


def _report(detail: str) -> None:
    """The stage without its counts: "capturing graphs 3/30 (batch size 64)" is the stage "capturing graphs"."""
    print(re.split(r"[(\d]", detail)[0].strip(), flush=True)


if __name__ == "__main__":
    try:
        main(EngineConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
    except StartupError as error:
        print(f"minivllm: error: {error}", file=sys.stderr)
        sys.exit(1)
