"""The bodies of OpenAI's endpoints. A field is honoured, or refused by its name; what says nothing about the output
(who asks, what to keep of it) is accepted and has no effect."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from frontend.body import Body
from frontend.json_bytes import to_json
from frontend.schemas import DEFAULT_MAX_TOKENS, GenerationFields, Inputs, Messages, TokenIds
from minivllm.errors import InvalidRequestError
from minivllm.json_schema import ANY_OBJECT
from minivllm.sampling_params import SamplingParams

MAX_N = 128


def _prompt_arm(value: Any) -> str:
    """Which of the four forms of a prompt is meant."""
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, str):
        return "texts"
    return "lists" if isinstance(first, list) else "token_ids"


PromptForms = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Tag("texts"), Field(min_length=1, fail_fast=True)]
    | Annotated[TokenIds, Tag("token_ids"), Field(min_length=1)]
    | Annotated[list[Annotated[TokenIds, Field(min_length=1)]], Tag("lists"), Field(min_length=1, fail_fast=True)],
    Discriminator(_prompt_arm),
]


class StreamOptions(Body):
    """What a stream tells besides the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against observers of the connection: none is added here


class JsonSchemaFormat(Body):
    """A schema and what the client calls it. Every schema is followed strictly, or refused."""

    name: str | None = None
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    """Free text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise InvalidRequestError(
                "response_format: json_schema must be there if and only if type is json_schema", "response_format"
            )
        return self

    @property
    def schema_text(self) -> str | None:
        """The schema that the output follows, if any. The order of properties is kept."""
        if self.json_schema is not None:
            return to_json(self.json_schema.json_schema).decode()
        return ANY_OBJECT if self.type == "json_object" else None


class OpenAIFields(GenerationFields):
    """What both endpoints take."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    max_completion_tokens: int | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None  # type: ignore[assignment] # null is sent by clients that leave it open
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @model_validator(mode="after")
    def _check_openai(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options needs stream", "stream_options")
        return self

    @property
    def asked_model(self) -> str | None:
        """See the base."""
        return self.model

    @property
    def num_choices(self) -> int:
        """See the base."""
        return self.n or 1

    @property
    def schema_param(self) -> str:
        """See the base."""
        return "response_format"

    def _openai_params(self, default_max_tokens: int | None, **derived: int | str | None) -> SamplingParams:
        if self.response_format is not None:
            derived["json_schema"] = self.response_format.schema_text
        if self.max_completion_tokens is not None:  # the newer name of max_tokens; clients may send both
            derived["max_tokens"] = self.max_completion_tokens
            with _said_as("max_tokens", "max_completion_tokens"):
                return self.sampling_params(default_max_tokens, **derived)
        return self.sampling_params(default_max_tokens, **derived)


@contextmanager
def _said_as(name: str, here: str) -> Iterator[None]:
    """An error about the parameter `name` is one about the field `here`."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param != name:
            raise
        raise InvalidRequestError(str(error).replace(name, here), here) from None


class CompletionRequest(OpenAIFields):
    """POST /v1/completions."""

    prompt: PromptForms
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise InvalidRequestError(f"best_of must be n ({self.num_choices}), got {self.best_of}", "best_of")
        if self.suffix:
            raise InvalidRequestError("suffix is not supported: the model continues its prompt", "suffix")
        return self

    def inputs(self) -> Inputs:
        """See the base."""
        prompts: Any = self.prompt
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        return Inputs("prompt", prompts, add_special_tokens=self.add_special_tokens is not False)

    def params(self) -> SamplingParams:
        """See the base."""
        return self._openai_params(DEFAULT_MAX_TOKENS, prompt_logprobs=self.logprobs if self.echo else None)


class ChatCompletionRequest(OpenAIFields):
    """POST /v1/chat/completions."""

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[Any], Field(description="must be empty: there are no tools yet")] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs", "top_logprobs")
        if self.tools:
            raise InvalidRequestError("tools are not supported", "tools")
        return self

    def inputs(self) -> Inputs:
        """See the base."""
        return Inputs("messages", messages=self.messages, add_special_tokens=self.add_special_tokens is True)

    def params(self) -> SamplingParams:
        """See the base."""
        with _said_as("logprobs", "top_logprobs"):
            return self._openai_params(None, logprobs=(self.top_logprobs or 0) if self.logprobs else None)
