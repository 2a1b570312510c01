"""What a lab found: pure data, for the terminal and for the sheet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Rows:
    """A table. Cells are text already."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Findings:
    """`number` is the one sentence with the number; `broken` says what the break-it run did to it."""

    number: str
    broken: str
    tables: list[Rows]
    figure: "Figure"
    code: Sequence[Callable[..., Any] | type]  # what does it, for the file and lines in the sheet
    notes: list[str] = field(default_factory=list)
