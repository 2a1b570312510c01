"""The bodies of the endpoints: which fields there are and what they may hold. Unknown fields are refused."""

import re
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from minivllm.errors import InvalidRequestError
from minivllm.sampling_params import SamplingParams

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024  # characters
DEFAULT_MAX_TOKENS = 16  # for a prompt; a chat may fill the context

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
StopString = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
_REQUEST_ID = r"[!-~]{1,256}"  # what a header can carry
RequestId = Annotated[str, Field(pattern=f"^{_REQUEST_ID}$", description="unique among the unfinished ones")]


def is_request_id(text: str) -> bool:
    """Whether `text` can be the id of a request."""
    return re.fullmatch(_REQUEST_ID, text) is not None


def _text_or(other: str) -> Discriminator:
    """Tells the arms of a union apart by whether the value is text, so that an error is about the one meant."""
    return Discriminator(lambda value: "text" if isinstance(value, str) else other)


_SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__)


class Body(BaseModel):
    """Base: exact types, finite numbers, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(Body):
    """A piece of a message's content."""

    type: Annotated[str, Field(pattern="^text$")]
    text: str


class ChatMessage(Body):
    """One turn of a chat."""

    role: str
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("parts"), Field(fail_fast=True)], _text_or("parts")
    ]
    name: str | None = None

    def as_template_input(self) -> dict[str, Any]:
        """Plain data, its text parts joined by line breaks."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        message = {"role": self.role, "content": content}
        return message if self.name is None else message | {"name": self.name}


class SamplingFields(Body):
    """The fields of `SamplingParams`; null and absent mean the default. Ranges are checked by `SamplingParams`."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    seed: int | None = None
    stop: (
        Annotated[Annotated[StopString, Tag("text")] | Annotated[StopStrings, Tag("several")], _text_or("several")]
        | None
    ) = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    def sampling_params(self, default_max_tokens: int | None) -> SamplingParams:
        """Raises `InvalidRequestError` for a value out of its range."""
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name, None)) is not None}
        given.setdefault("max_tokens", default_max_tokens)
        stop = given.get("stop", ())
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        given["stop_token_ids"] = tuple(given.get("stop_token_ids", ()))
        return SamplingParams(**given)


class PromptFields(Body):
    """What the model reads: either a prompt (text or token ids) or the messages of a chat."""

    prompt: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[TokenIds, Tag("token_ids"), Field(min_length=1)],
            _text_or("token_ids"),
        ]
        | None
    ) = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either prompt or messages", "prompt")
        if self.add_special_tokens is not None and not isinstance(self.prompt, str):
            raise InvalidRequestError("add_special_tokens needs a prompt that is text", "add_special_tokens")
        return self

    @property
    def param(self) -> str:
        """The name of the field that is there."""
        return "messages" if self.prompt is None else "prompt"


class GenerateRequest(PromptFields, SamplingFields):
    """POST /generate."""

    stream: bool = True
    request_id: RequestId | None = None

    def params(self) -> SamplingParams:
        """Raises `InvalidRequestError` for a value out of its range."""
        return self.sampling_params(DEFAULT_MAX_TOKENS if self.messages is None else None)


class TokenizeRequest(PromptFields):
    """POST /tokenize."""


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: TokenIds
    skip_special_tokens: bool = True
