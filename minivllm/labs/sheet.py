"""A lab's findings as a Markdown sheet with its picture, and as tables on the terminal."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minivllm.errors import StartupError
from minivllm.labs.catalogue import Lab
from minivllm.labs.findings import Findings, Rows
from minivllm.plots import save_figure

_ROOT = Path(__file__).parents[2]


def code_reference(code: Callable[..., Any] | type) -> tuple[str, str]:
    """(qualified name, "file:first-last") of what does it, from the source as it is now."""
    target = inspect.unwrap(code)
    lines, first = inspect.getsourcelines(target)
    file = Path(inspect.getfile(target)).relative_to(_ROOT)
    return target.__qualname__, f"{file}:{first}-{first + len(lines) - 1}"


def write_sheet(lab: Lab, findings: Findings, made_by: str, directory: Path) -> Path:
    """Write NAME.md and NAME.svg into `directory`; the path of the sheet. Raises `StartupError`."""
    sheet, picture = directory / f"{lab.name}.md", directory / f"{lab.name}.svg"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        sheet.write_text(_markdown(lab, findings, made_by, picture.name), encoding="utf-8")
    except OSError as error:
        raise StartupError(f"--out {directory}: {error.strerror}") from error
    save_figure(findings.figure, picture)
    return sheet


def print_findings(findings: Findings, console: Console) -> None:
    """The number, the break-it run, and the tables."""
    for rows in findings.tables:
        table = Table(title=rows.title, title_justify="left")
        for index, column in enumerate(rows.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows.rows:
            table.add_row(*row)
        console.print(table)
    console.print(findings.number, style="bold")
    console.print(f"Broken on purpose: {findings.broken}")
    for note in findings.notes:
        console.print(note, style="dim")
    for code in findings.code:
        name, place = code_reference(code)
        console.print(f"  {name}  {place}")


def _markdown(lab: Lab, findings: Findings, made_by: str, picture: str) -> str:
    parts = [
        f"# Lab: {lab.title}",
        lab.idea,
        f"**{findings.number}**",
        f"![{lab.title}]({picture})",
        *map(_markdown_table, findings.tables),
        f"**Broken on purpose** ({lab.break_it}): {findings.broken}",
        *findings.notes,
        "The code that does it:",
        "\n".join(f"- `{name}` in {place}" for name, place in map(code_reference, findings.code)),
        f"Made by {made_by}.",
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Rows) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (table.columns, *table.rows)]
    lines.insert(1, "|" + "---|" * len(table.columns))
    return f"{table.title}:\n\n" + "\n".join(lines)
