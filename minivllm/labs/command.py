"""`minivllm lab`: lists the labs; `minivllm lab NAME` runs one or all, prints what is found and writes the sheets."""

import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from minivllm.labs.catalogue import ALL, LABS, Lab
from minivllm.labs.options import LabOptions
from minivllm.logs import setup_logging
from minivllm.options import load_options
from minivllm.plots import require_matplotlib

if TYPE_CHECKING:
    from minivllm.bench.offline.machine import Machine


def main(arguments: Sequence[str], prog: str) -> int:
    """Run labs or list them. 0: done; 2: bad arguments. Raises `StartupError`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_list(prog))
        return 0
    name = arguments[0]
    if name not in (*LABS, ALL):
        print(f"{prog}: error: unknown lab {name!r} (see {prog})", file=sys.stderr)
        return 2
    options = load_options(LabOptions, arguments[1:], f"{prog} {name}")
    require_matplotlib()
    setup_logging("Lab")
    _run([*LABS.values()] if name == ALL else [LABS[name]], options)
    return 0


def _run(labs: Sequence[Lab], options: LabOptions) -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the engine core: read when torch is first imported
    from minivllm.bench.offline.shapes import located
    from minivllm.bench.offline.watch import Watch
    from minivllm.labs.devices import Devices
    from minivllm.labs.sheet import print_findings, write_sheet
    from minivllm.labs.workbench import Workbench

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    devices = Devices()
    with located(options) as (resolved, directory):
        for lab in labs:
            start = time.monotonic()
            with Watch() as watch:
                bench = Workbench(resolved, directory, devices, watch)
                findings = lab.run(bench)
            sheet = write_sheet(lab, findings, _made_by(lab, options, bench.machine), options.out)
            print_findings(findings, console)
            console.print(f"The sheet is {sheet} ({time.monotonic() - start:.0f} s)")


def _made_by(lab: Lab, options: LabOptions, machine: "Machine | None") -> str:
    from minivllm.bench.offline.shapes import model_name

    command = f"minivllm lab {lab.name}{' --quick' if options.quick else ''}"
    return f"`{command}` on {machine or 'any machine'}, {model_name(options)}"


def _list(prog: str) -> str:
    lines = [f"usage: {prog} NAME [MODEL] [options]", "", "labs, each under a minute on two cores:"]
    lines += [f"  {lab.name:<20} {lab.title}" for lab in LABS.values()]
    lines += [f"  {ALL:<20} one after the other"]
    return "\n".join([*lines, "", f"{prog} NAME --help shows the options."])
