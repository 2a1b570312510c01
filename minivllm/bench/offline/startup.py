"""`minivllm bench startup`: from a process's start until it can serve, with empty compile caches and filled ones."""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

from engine_core.model_loader import choose_device
from minivllm.bench.offline.loading import FIRST_TOKEN, READY
from minivllm.bench.offline.machine import this_machine
from minivllm.bench.offline.options import StartupOptions
from minivllm.bench.offline.report import Measurement, Report
from minivllm.bench.offline.runs import MeasurementError
from minivllm.bench.offline.shapes import model_name
from minivllm.bench.offline.watch import Watch
from minivllm.config import EngineConfig

_CACHES = ("MINIVLLM_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")


def measure_startup(options: StartupOptions, directory: Path, watch: Watch) -> Report:
    """Raises `MeasurementError`."""
    watch.plan(2 * options.repeats)
    pairs = []
    for index in range(options.repeats):
        with tempfile.TemporaryDirectory(prefix="minivllm-cold-") as cache:
            start = partial(time_start, options, directory, cache)
            label = f"start, {index + 1} of {options.repeats}"
            pairs.append([watch.run(f"{kind} {label}", start) for kind in ("cold", "warm")])
    rows = []
    for index, caches in enumerate(("cold caches", "warm caches")):
        for event in (READY, FIRST_TOKEN):
            seconds = median(pair[index][event] for pair in pairs)
            rows.append(Measurement(f"start to {event}, {caches}", seconds, "s"))
    return Report(
        title=f"Start-up: {model_name(options)}, median of {options.repeats}",
        machine=this_machine(choose_device(options)),
        measurements=rows,
        notes=["cold: no compiled kernels; files are in the operating system's cache both times"],
        stages=_stages(*pairs[0]),
    )


def time_start(options: EngineConfig, directory: Path, cache: str) -> dict[str, float]:
    """Seconds from the start of a process to each stage that it reports. Raises `MeasurementError`."""
    config = EngineConfig.model_validate(options.model_dump(include=set(EngineConfig.model_fields)))
    command = [sys.executable, "-m", "minivllm.bench.offline.loading", config.model_dump_json(), str(directory)]
    environment = os.environ | {name: str(Path(cache) / name) for name in _CACHES}
    moments: dict[str, float] = {}
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            moments.setdefault(line.strip(), time.perf_counter() - start)
    if process.returncode != 0 or FIRST_TOKEN not in moments:
        raise MeasurementError(f"the engine did not start: exit code {process.returncode}")
    return moments


def _stages(cold: dict[str, float], warm: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Each stage's own seconds, (cold, warm)."""
    cold_own, warm_own = _own_seconds(cold), _own_seconds(warm)
    return {stage: (seconds, warm_own.get(stage, 0.0)) for stage, seconds in cold_own.items()}


def _own_seconds(moments: dict[str, float]) -> dict[str, float]:
    """A stage lasts until the next one is reported; what comes first is the interpreter."""
    names = ["starting Python", *list(moments)[:-1]]
    begins = [0.0, *list(moments.values())[:-1]]
    own = {name: end - begin for name, begin, end in zip(names, begins, moments.values(), strict=True)}
    if READY in own:
        own["from ready to the first token"] = own.pop(READY)
    return own
