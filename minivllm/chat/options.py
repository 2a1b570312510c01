"""Options of `minivllm chat`."""

from typing import Literal

from pydantic import Field

from minivllm.config import Options, Positive


class ChatOptions(Options):
    """Which server, and how it is to answer."""

    model: str | None = Field(None, description="name to ask for; default: the first that the server lists")
    url: str = Field("http://127.0.0.1:8000", description="address of the server")
    api_key: str | None = Field(None, repr=False, description="key that is sent as a bearer token")
    endpoint: Literal["chat", "generate"] = Field("chat", description="/v1/chat/completions or /generate")
    system: str | None = Field(None, description="what the model is told before the first question")
    max_tokens: Positive | None = Field(None, description="longest answer; default: the rest of the context")
    temperature: float | None = Field(None, ge=0.0, description="of sampling; default: the server's")
