"""Writes what a terminal showed over time as one animated SVG, small enough for a README.

Every piece of text is there once, with the spans of time in which it stood at its place. Without animation (print,
reduced motion, a simple viewer) the last frame is shown.
"""

import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.terminal_theme import SVG_EXPORT_THEME

_CELL_WIDTH, _LINE_HEIGHT, _FONT_SIZE = 8.4, 18.0, 14
_MARGIN, _TITLE_HEIGHT = 14, 36
_BACKGROUND, _FRAME = "#16181d", "#2b2f38"
_FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"

_RUN = re.compile(r"[^ ]+(?: [^ ]+)*")


class Piece(NamedTuple):
    """Text of one style at one place of the screen."""

    row: int
    column: int
    text: str
    color: str
    bold: bool


class Frame(NamedTuple):
    """What the screen shows from `time` (seconds) on."""

    time: float
    pieces: frozenset[Piece]


def capture(time: float, screen: RenderableType, width: int, height: int) -> Frame:
    """A frame with what rich draws of `screen` on a terminal of `width` × `height` cells."""
    console = Console(width=width, height=height, color_system="truecolor", force_terminal=True, legacy_windows=False)
    pieces: set[Piece] = set()
    for row, line in enumerate(console.render_lines(screen, console.options.update(width=width))[:height]):
        pieces.update(_pieces(row, line))
    return Frame(time, frozenset(pieces))


def render_svg(
    frames: Sequence[Frame], title: str, width: int, height: int, slowdown: float = 1.0, hold: float = 4.0
) -> str:
    """`frames` shown again and again, `slowdown` times slower; the last one stays for `hold` seconds."""
    frames = [Frame(frame.time * slowdown, frame.pieces) for frame in frames]
    duration = frames[-1].time - frames[0].time + hold
    spans = _spans(frames)
    names = {span: f"t{number}" for number, span in enumerate(sorted(set(spans.values())))}
    body = [_text(piece, names[span]) for piece, span in sorted(spans.items())]
    rules = [_rule(name, span, frames, duration) for span, name in names.items()]
    size = (round(2 * _MARGIN + width * _CELL_WIDTH), round(_MARGIN + _TITLE_HEIGHT + height * _LINE_HEIGHT))
    return "\n".join([_head(*size, escape(title)), *_styles(rules), *body, "</svg>", ""])


Spans = tuple[tuple[int, int], ...]  # from frame, to frame (exclusive)


def _spans(frames: Sequence[Frame]) -> dict[Piece, Spans]:
    """When each piece is on the screen."""
    spans: dict[Piece, list[tuple[int, int]]] = {}
    for index, frame in enumerate(frames):
        for piece in frame.pieces:
            shown = spans.setdefault(piece, [])
            if shown and shown[-1][1] == index:
                shown[-1] = (shown[-1][0], index + 1)
            else:
                shown.append((index, index + 1))
    return {piece: tuple(shown) for piece, shown in spans.items()}


def _pieces(row: int, line: Sequence[Segment]) -> list[Piece]:
    """The visible text of a line: runs of one style, cut where blanks are wider than one."""
    pieces, column = [], 0
    for text, style, _ in Segment.simplify(line):
        for run in _RUN.finditer(text):
            start = column + cell_len(text[: run.start()])
            pieces.append(Piece(row, start, run[0], _color(style), bool(style and style.bold)))
        column += cell_len(text)
    return pieces


def _color(style: Style | None) -> str:
    if style is None or style.color is None or style.color.is_default:
        return SVG_EXPORT_THEME.foreground_color.hex
    return style.color.get_truecolor(SVG_EXPORT_THEME).hex


def _text(piece: Piece, name: str) -> str:
    x = _MARGIN + piece.column * _CELL_WIDTH
    if set(piece.text) == {"│"}:  # as glyphs they would not touch each other
        top = _TITLE_HEIGHT + piece.row * _LINE_HEIGHT
        bars = "".join(
            f"M{x + (index + 0.5) * _CELL_WIDTH:.1f} {top - 2:.1f}v{_LINE_HEIGHT + 2:.0f}"
            for index in range(len(piece.text))
        )
        return f'<path class="{name}" d="{bars}" stroke="{piece.color}"/>'
    y = _TITLE_HEIGHT + (piece.row + 0.75) * _LINE_HEIGHT
    length = cell_len(piece.text) * _CELL_WIDTH
    bold = ' font-weight="bold"' if piece.bold else ""
    return (
        f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" textLength="{length:.1f}" fill="{piece.color}"{bold}>'
        f"{escape(piece.text, quote=False)}</text>"
    )


def _rule(name: str, spans: Spans, frames: Sequence[Frame], duration: float) -> str:
    """CSS that shows class `name` during `spans`; nothing for what is always there."""
    if spans == ((0, len(frames)),):
        return ""
    first = frames[0].time
    steps = {0.0: 0}
    for start, end in spans:
        steps[100 * (frames[start].time - first) / duration] = 1
        if end < len(frames):
            steps[100 * (frames[end].time - first) / duration] = 0
    keyframes = "".join(f"{percent:.2f}%{{opacity:{opacity}}}" for percent, opacity in sorted(steps.items()))
    still = 1 if spans[-1][1] == len(frames) else 0
    return (
        f".{name}{{opacity:{still};animation:{name} {duration:.2f}s step-end infinite}}@keyframes {name}{{{keyframes}}}"
    )


def _styles(rules: Sequence[str]) -> list[str]:
    reduced = "@media (prefers-reduced-motion:reduce){*{animation:none!important}}"
    return [
        "<style>",
        f"text{{font:{_FONT_SIZE}px {_FONT};white-space:pre}}",
        *filter(None, rules),
        reduced,
        "</style>",
    ]


def _head(width: int, height: int, title: str) -> str:
    lights = "".join(
        f'<circle cx="{20 + 20 * index}" cy="18" r="6" fill="{color}"/>'
        for index, color in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">\n'
        f'<rect width="{width}" height="{height}" rx="10" fill="{_BACKGROUND}" stroke="{_FRAME}"/>\n{lights}'
        f'<text x="{width / 2:.0f}" y="22" text-anchor="middle" fill="#9aa0aa">{title}</text>'
    )
