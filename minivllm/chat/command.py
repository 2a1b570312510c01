"""`minivllm chat`: reads a line, streams the answer, again. Ctrl-C stops an answer, Ctrl-D ends."""

import asyncio
import contextlib
import sys
from collections.abc import Callable, Sequence

import httpx
from rich.console import Console

from minivllm.chat.conversation import Conversation
from minivllm.chat.options import ChatOptions
from minivllm.event_stream import ServerError
from minivllm.options import load_options

_HELP = """/reset         forget what was said
/system TEXT   tell the model something before everything else (and forget what was said)
/exit          leave; so does Ctrl-D. Ctrl-C stops an answer"""


def main(arguments: Sequence[str], prog: str) -> int:
    """Chat until the end of the input. 0: left as asked; 2: bad arguments."""
    options = load_options(ChatOptions, arguments, prog)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` editing and a history
    console = Console(highlight=False)
    if sys.stdin.isatty():
        console.print(f"Chatting with {options.url} (/help shows the commands, Ctrl-D leaves)", style="dim")
    Terminal(Conversation(options), console, input).run()
    return 0


class Terminal:
    """The loop. read_line: shows a prompt and returns a line; raises EOFError at the end, KeyboardInterrupt."""

    def __init__(self, conversation: Conversation, console: Console, read_line: Callable[[str], str]) -> None:
        self._conversation = conversation
        self._console = console
        self._read_line = read_line

    def run(self) -> None:
        """Returns when the user leaves."""
        while (line := self._next_line()) is not None:
            if line.startswith("/"):
                if not self._obey(line):
                    return
            elif line:
                self._answer(line)

    def _next_line(self) -> str | None:
        try:
            return self._read_line("> ").strip()
        except EOFError:
            self._console.print()
            return None
        except KeyboardInterrupt:
            self._console.print("(Ctrl-D leaves)", style="dim")
            return ""

    def _obey(self, line: str) -> bool:
        """Carry out a command. False: leave."""
        name, _, argument = line.partition(" ")
        match name:
            case "/exit" | "/quit":
                return False
            case "/reset":
                self._conversation.reset()
            case "/system":
                self._conversation.reset()
                self._conversation.system = argument.strip() or None
            case _:
                self._console.print(_HELP, style="dim", markup=False)
        return True

    def _answer(self, question: str) -> None:
        try:
            asyncio.run(self._print_answer(question))
        except KeyboardInterrupt:
            self._console.print(" [stopped]", style="dim", markup=False)
        except (ServerError, httpx.HTTPError) as error:
            self._console.print(f"error: {str(error) or type(error).__name__}", style="red", markup=False)
        else:
            self._console.print(f"\n({self._conversation.last})", style="dim", markup=False)

    async def _print_answer(self, question: str) -> None:
        async with contextlib.aclosing(self._conversation.ask(question)) as pieces:
            async for text in pieces:
                self._console.print(text, end="", markup=False, soft_wrap=True)
