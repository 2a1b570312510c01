"""`minivllm lab`: lists the labs; `minivllm lab NAME` runs one, prints what it found and writes its sheet."""

import os
import sys
from collections.abc import Sequence

from rich.console import Console

from minivllm.labs.catalogue import LABS, Lab
from minivllm.labs.options import LabOptions
from minivllm.logs import setup_logging
from minivllm.options import load_options
from minivllm.plots import require_matplotlib


def main(arguments: Sequence[str], prog: str) -> int:
    """Run a lab or list all. 0: done; 2: bad arguments. Raises `StartupError`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_list(prog))
        return 0
    lab = LABS.get(arguments[0])
    if lab is None:
        print(f"{prog}: error: unknown lab {arguments[0]!r} (see {prog})", file=sys.stderr)
        return 2
    options = load_options(LabOptions, arguments[1:], f"{prog} {lab.name}")
    require_matplotlib()
    setup_logging("Lab")
    _run(lab, options)
    return 0


def _run(lab: Lab, options: LabOptions) -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the engine core: read when torch is first imported
    from minivllm.bench.offline.watch import Watch
    from minivllm.labs.sheet import print_findings, write_sheet
    from minivllm.labs.workbench import Workbench

    with Watch() as watch:
        bench = Workbench(options, watch)
        findings = lab.run(bench)
    command = f"minivllm lab {lab.name}{' --quick' if options.quick else ''}"
    sheet = write_sheet(lab, findings, f"`{command}` on {bench.machine or 'any machine'}, {options.model}", options.out)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    print_findings(findings, console)
    console.print(f"The sheet is {sheet}")


def _list(prog: str) -> str:
    lines = [f"usage: {prog} NAME [MODEL] [options]", "", "labs, each under a minute on two cores:"]
    lines += [f"  {lab.name:<20} {lab.title}" for lab in LABS.values()]
    return "\n".join([*lines, "", f"{prog} NAME --help shows the options."])
