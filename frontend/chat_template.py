"""Renders chat messages as the model was trained to see them: Jinja templates, exactly as transformers runs them.

Templates come with the model, so they are untrusted code: they run in Jinja's immutable sandbox and see only plain
data. The environment copies transformers' `_compile_jinja_template` (transformers/utils/chat_template_utils.py).
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minivllm.errors import InvalidRequestError, StartupError

Message = Mapping[str, Any]


class ChatTemplate:
    """One compiled template. Raises `StartupError` when its syntax is broken."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self._knows_developers = "developer" in source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise StartupError(f"the chat template is broken: line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt text. Raises `InvalidRequestError` when the template refuses the messages."""
        try:
            return self._template.render(
                messages=[self._known(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        # A template is a program of others: besides raise_exception it can divide by zero or index what is not there.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise InvalidRequestError(f"messages do not fit the chat template: {error}", "messages") from error

    def _known(self, message: Message) -> Message:
        """OpenAI's newer name of the system role, in the words of a template that does not know it."""
        if message["role"] == "developer" and not self._knows_developers:
            return {**message, "role": "system"}
        return message


def find_chat_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The model's template source: chat_template.jinja, chat_template.json, then tokenizer_config.json."""
    jinja_file, json_file = directory / "chat_template.jinja", directory / "chat_template.json"
    if jinja_file.is_file():
        return jinja_file.read_text(encoding="utf-8")
    if json_file.is_file():
        return _default_template(json.loads(json_file.read_text(encoding="utf-8"))["chat_template"])
    return _default_template(tokenizer_config.get("chat_template"))


def _default_template(template: str | list[dict[str, str]] | None) -> str | None:
    """A model may bring several named templates; the one for plain chat is called "default"."""
    if isinstance(template, list):
        return next((named["template"] for named in template if named["name"] == "default"), None)
    return template


class _GenerationBlock(Extension):
    """`{% generation %}` marks what an assistant said, for training; here it only passes its content through."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter it does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - the local day, as transformers
