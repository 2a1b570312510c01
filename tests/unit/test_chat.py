"""`minivllm chat`: history, commands, what Ctrl-C stops, and errors that do not end the conversation."""

import asyncio
import io
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from rich.console import Console

from minivllm.chat.command import Terminal
from minivllm.chat.conversation import Conversation
from minivllm.chat.options import ChatOptions
from tests.unit.bench.openai_server import API_KEY, CANNOT, OpenAIServer


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


class Chat:
    """A terminal whose lines come from a list; an exception in it is raised."""

    def __init__(self, conversation: Conversation, *lines: str | type[BaseException]) -> None:
        self._lines = iter(lines)
        self._output = io.StringIO()
        self.conversation = conversation
        Terminal(conversation, Console(file=self._output, width=200), self._read_line).run()

    def _read_line(self, prompt: str) -> str:
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    @property
    def shown(self) -> str:
        return self._output.getvalue()


def conversation_with(server: OpenAIServer, **options: Any) -> Conversation:
    return Conversation(ChatOptions(url=server.url, **{"api_key": API_KEY, "max_tokens": 3, **options}))


def test_the_history_is_sent_until_it_is_reset(server: OpenAIServer) -> None:
    chat = Chat(conversation_with(server, system="be kind", temperature=0.5), "Hi", "", "More", "/reset", "Again")
    asked = [[message["content"] for message in body["messages"]] for body in server.bodies]
    assert asked == [["be kind", "Hi"], ["be kind", "Hi", "0 1 2 ", "More"], ["be kind", "Again"]]
    body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("the-model", 3, 0.5, True)
    assert chat.shown.count("0 1 2 ") == 3
    assert "3 tokens" in chat.shown


def test_commands(server: OpenAIServer) -> None:
    chat = Chat(conversation_with(server), "/help", "/system  be brief", KeyboardInterrupt, "Hi", "/exit", "never read")
    assert [message["content"] for message in server.bodies[0]["messages"]] == ["be brief", "Hi"]
    assert len(server.bodies) == 1
    assert "/reset" in chat.shown
    assert "Ctrl-D leaves" in chat.shown


def test_an_error_is_shown_and_forgotten(server: OpenAIServer) -> None:
    conversation = conversation_with(server, max_tokens=CANNOT)
    assert "error: the server answered 400: this cannot be" in Chat(conversation, "Hi").shown
    assert conversation.turns == []
    assert "wrong key" in Chat(conversation_with(server, api_key="no"), "Hi").shown
    nobody = Conversation(ChatOptions(url="http://127.0.0.1:9", model="m"))
    assert "error: " in Chat(nobody, "Hi").shown


def test_generate_is_understood_too() -> None:
    events = [{"text": "Hel", "token_ids": [1, 2]}, {"text": "lo", "token_ids": [3], "usage": {"completion_tokens": 3}}]
    content = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=content))
    conversation = Conversation(ChatOptions(endpoint="generate"), transport)
    assert "Hello" in Chat(conversation, "Hi").shown
    assert (conversation.last.num_tokens, conversation.turns[-1]["content"]) == (3, "Hello")


class Endless(httpx.AsyncByteStream):
    """An answer that goes on until somebody interrupts it."""

    def __init__(self, on_second: Callable[[], None]) -> None:
        self._on_second = on_second
        self.is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'data: {"text": "la", "token_ids": [1]}\n\n'
        self._on_second()
        await asyncio.sleep(60)

    async def aclose(self) -> None:
        self.is_closed = True


def test_ctrl_c_stops_the_answer_and_keeps_what_came() -> None:
    stream = Endless(lambda: signal.raise_signal(signal.SIGINT))
    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=stream))
    chat = Chat(Conversation(ChatOptions(endpoint="generate"), transport), "Sing")
    assert "la [stopped]" in chat.shown
    assert chat.conversation.turns[-1] == {"role": "assistant", "content": "la"}
    assert stream.is_closed, "the server would go on"


def test_the_command_reads_a_pipe(server: OpenAIServer) -> None:
    command = [sys.executable, "-m", "minivllm", "chat", "--url", server.url, "--api-key", API_KEY, "--max-tokens", "2"]
    result = subprocess.run(command, input="Hi\n", capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "0 1 " in result.stdout
