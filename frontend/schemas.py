"""The bodies of the endpoints: which fields there are and what they may hold. Unknown fields are refused."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field, Tag, model_validator

from frontend.body import Body, RequestId, text_or
from frontend.json_bytes import to_json
from frontend.messages import ChatMessage
from minivllm.errors import InvalidRequestError
from minivllm.sampling_params import SamplingParams

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024  # characters
DEFAULT_MAX_TOKENS = 16  # for a prompt; a chat may fill the context

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
StopString = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]

Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
_SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__)


class Inputs(NamedTuple):
    """What the model is to read: prompts, or the messages of a chat. `param` names the field that says so."""

    param: str
    prompts: Sequence[str | list[int]] = ()
    messages: Sequence[ChatMessage] = ()
    add_special_tokens: bool = False


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
        Annotated[Annotated[StopString, Tag("text")] | Annotated[StopStrings, Tag("several")], text_or("several")]
        | None
    ) = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    def sampling_params(self, default_max_tokens: int | None, **derived: int | str | None) -> SamplingParams:
        """`derived` are fields that the endpoint says in its own way. Raises `InvalidRequestError` for a bad value."""
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name, None)) is not None}
        given |= derived
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
            text_or("token_ids"),
        ]
        | None
    ) = None
    messages: Messages | None = None
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

    def inputs(self) -> Inputs:
        """The prompt or the messages."""
        if self.messages is not None:
            return Inputs(self.param, messages=self.messages)
        prompts = [] if self.prompt is None else [self.prompt]
        return Inputs(self.param, prompts, add_special_tokens=self.add_special_tokens is not False)


class GenerationFields(SamplingFields):
    """What the body of every generating endpoint tells, each in its own way."""

    stream: bool = False
    request_id: RequestId | None = None

    @property
    def asked_model(self) -> str | None:
        """The model that the client names."""
        return None

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return 1

    @property
    def schema_param(self) -> str:
        """The name of the field that asks for a JSON schema."""
        return "json_schema"

    @abstractmethod
    def inputs(self) -> Inputs:
        """What the model is to read."""

    @abstractmethod
    def params(self) -> SamplingParams:
        """Raises `InvalidRequestError` for a value out of its range."""


class GenerateRequest(PromptFields, GenerationFields):
    """POST /generate."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: dict[str, Any] | None = None
    stream: bool = True

    def params(self) -> SamplingParams:
        """See the base."""
        schema = None if self.json_schema is None else to_json(self.json_schema).decode()
        return self.sampling_params(DEFAULT_MAX_TOKENS if self.messages is None else None, json_schema=schema)


class TokenizeRequest(PromptFields):
    """POST /tokenize."""


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: TokenIds
    skip_special_tokens: bool = True
