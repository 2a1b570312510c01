"""The messages of a chat as clients send them, and as the templates of models read them."""

import json
from typing import Annotated, Any, Self

from pydantic import Field, Tag, model_validator

from frontend.body import Body, text_or
from minivllm.errors import InvalidRequestError


class TextPart(Body):
    """A piece of a message's content."""

    type: Annotated[str, Field(pattern="^text$")]
    text: str


class FunctionCall(Body):
    """What an assistant called. `arguments` is a JSON object, written as text."""

    name: str
    arguments: str

    def as_template_input(self) -> dict[str, Any]:
        """Templates read the arguments as an object. Raises `InvalidRequestError` where the text is none."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except ValueError as error:
            raise InvalidRequestError(f"messages: arguments of {self.name} are not JSON: {error}", "messages") from None
        if not isinstance(arguments, dict):
            raise InvalidRequestError(f"messages: arguments of {self.name} are not a JSON object", "messages")
        return {"name": self.name, "arguments": arguments}


class ToolCall(Body):
    """One call, with the id that the tool's answer refers to."""

    id: str
    type: Annotated[str, Field(pattern="^function$")] = "function"
    function: FunctionCall

    def as_template_input(self) -> dict[str, Any]:
        """Plain data."""
        return {"id": self.id, "type": self.type, "function": self.function.as_template_input()}


class ChatMessage(Body):
    """One turn of a chat. Fields that are null are those of answers that clients send back as they came."""

    role: str
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("parts"), Field(fail_fast=True)], text_or("parts")
    ]
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        """Null says nothing, whatever the field; but only who calls a tool may leave the content open."""
        if not isinstance(value, dict):
            return value
        said = {name: field for name, field in value.items() if field is not None or name == "content"}
        return said | {"content": ""} if said.get("content") is None and said.get("tool_calls") else said

    @model_validator(mode="after")
    def _check_arguments(self) -> Self:
        for call in self.tool_calls or ():
            call.as_template_input()
        return self

    def as_template_input(self) -> dict[str, Any]:
        """Plain data, its text parts joined by line breaks."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        message: dict[str, Any] = {"role": self.role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [call.as_template_input() for call in self.tool_calls]
        optional = ("name", "tool_call_id", "reasoning_content")
        return message | {name: value for name in optional if (value := getattr(self, name)) is not None}
