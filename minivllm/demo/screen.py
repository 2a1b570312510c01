"""Draws the demo: three answers side by side, and below them which tokens shared each step of the engine."""

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from minivllm.demo.state import Client, DemoState, Part, Step

WIDTH, HEIGHT = 100, 26
_ANSWER_HEIGHT = 12
_LOG_LINES = HEIGHT - _ANSWER_HEIGHT - 4
_DIM = "grey58"


def draw(state: DemoState) -> RenderableType:
    """The whole screen, `WIDTH` × `HEIGHT` cells."""
    answers = Table.grid(expand=True)
    for _ in state.clients:
        answers.add_column(ratio=1)
    answers.add_row(*(_answer(client) for client in state.clients))
    return Group(answers, _log(state), _footer(state))


def _answer(client: Client) -> Panel:
    text = Text(client.question + "\n\n", style=_DIM)
    text.append(client.text, style="white")
    if client.started and client.finish_reason is None:
        text.append("▌", style=client.color)
    state = "streaming" if client.finish_reason is None else "done"
    subtitle = f"{_tokens(client.num_tokens)} · {state}" if client.started else "not there yet"
    return Panel(
        text,
        title=Text(client.name, style=f"bold {client.color}"),
        subtitle=Text(subtitle, style=_DIM),
        border_style=client.color if client.started else "grey35",
        height=_ANSWER_HEIGHT,
        box=box.ROUNDED,
        padding=(0, 1),
    )


def _log(state: DemoState) -> Panel:
    colors = {client.name: client.color for client in state.clients}
    lines = [_step(step, colors) for step in list(state.steps)[-_LOG_LINES:]]
    return Panel(
        Text("\n", no_wrap=True, overflow="ellipsis").join(lines),
        title=Text("steps of the engine core", style="bold white"),
        border_style="grey50",
        height=_LOG_LINES + 2,
        box=box.ROUNDED,
        padding=(0, 1),
    )


def _step(step: Step, colors: dict[str, str]) -> Text:
    """`step 12  decode   2 tokens  ■ alice 45  ·  ■ carol 61`: whose tokens it computed, by place in their sequence."""
    line = Text(no_wrap=True)
    line.append(f"step {step.number:>3}  ", style=_DIM)
    line.append(f"{step.kind:<8}", style="bold yellow" if step.kind == "prefill" else "white")
    num_tokens = sum(part.end - part.start for part in step.parts)
    line.append(f"{_tokens(num_tokens):>11}  ", style=_DIM)
    parts = {part.name: part for part in step.parts}
    for name, color in colors.items():
        line.append(f"{_part(parts[name]) if name in parts else '·':<20}", style=color if name in parts else _DIM)
    return line


def _part(part: Part) -> str:
    where = str(part.start) if part.end == part.start + 1 else f"{part.start}–{part.end - 1}"
    return f"■ {part.name} {where}"


def _tokens(count: int) -> str:
    return f"{count} token" + ("" if count == 1 else "s")


def _footer(state: DemoState) -> Text:
    rate = f"{state.num_tokens / state.seconds:.0f} tokens/s" if state.num_tokens else "no token yet"
    return Text(f"  {state.num_tokens} tokens in {state.num_steps} steps · {state.seconds:4.1f} s · {rate}", style=_DIM)
