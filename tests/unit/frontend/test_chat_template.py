"""Templates of the common families render exactly as transformers renders them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest

from frontend.chat_template import ChatTemplate
from frontend.messages import ChatMessage
from frontend.request_body import parse_body
from frontend.schemas import GenerateRequest
from frontend.tokenizer import Tokenizer
from minivllm.errors import InvalidRequestError, StartupError
from tests.unit.frontend.conftest import CHATML, byte_level

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
Today: {{ date_string }}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN = """{%- if tools %}
    {{- 'tools' }}
{%- else %}
    {%- if messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message.role == "assistant" %}
        {%- generation %}
            {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
    {%- if ns.count > 20 %}{%- break %}{%- endif %}
{%- endfor %}
{{- messages[0] | tojson(indent=2) }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
FIXTURES = Path(__file__).parents[2] / "fixtures" / "chat_templates"
FAMILIES = {file.stem: file.read_text(encoding="utf-8").removesuffix("\n") for file in FIXTURES.glob("*.jinja")}
LLAMA2 = FAMILIES["llama-2-chat"]
TEMPLATES = {"chatml": CHATML, "macros": LLAMA3, "generation": QWEN} | FAMILIES  # the first three use all of Jinja
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER, ASSISTANT = {"role": "user", "content": " Hi <b>é</b> & 'you' "}, {"role": "assistant", "content": "Hello!"}
SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
TOOL_CALL: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL: dict[str, Any] = {"role": "tool", "tool_call_id": "call12345", "content": "12 °C"}
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello!"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ASSISTANT, USER],
    "system and turns": [SYSTEM, USER, ASSISTANT, USER, THOUGHT, USER],
    "two in a row": [USER, USER],
    "tools": [USER, TOOL_CALL, TOOL, ASSISTANT, USER],
    "tool at the end": [SYSTEM, USER, TOOL_CALL, TOOL],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
}


def as_template_input(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [ChatMessage.model_validate_json(json.dumps(message)).as_template_input() for message in chat]


@pytest.fixture(scope="module")
def theirs() -> Callable[..., str]:
    """transformers' own rendering of what the template is given."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **SPECIAL_TOKENS)

    def render(template: str, chat: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)

    return render


def test_there_are_enough_families() -> None:
    assert len(FAMILIES) >= 12


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(name: str, chat: str, theirs: Callable[..., str]) -> None:
    """In what is rendered, and in what is refused."""
    ours, messages = ChatTemplate(TEMPLATES[name], SPECIAL_TOKENS), as_template_input(CHATS[chat])
    for add_generation_prompt in (True, False):
        try:
            expected = theirs(TEMPLATES[name], messages, add_generation_prompt)
        except (jinja2.TemplateError, TypeError) as error:
            with pytest.raises(InvalidRequestError, match=re.escape(str(error))):
                ours.render(messages, add_generation_prompt)
        else:
            assert ours.render(messages, add_generation_prompt) == expected


def test_tool_calls_reach_the_template_as_objects() -> None:
    chat = as_template_input(CHATS["tools"])
    rendered = ChatTemplate(FAMILIES["qwen2.5-instruct"], SPECIAL_TOKENS).render(chat)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>' in rendered
    assert "<tool_response>\n12 °C\n</tool_response>" in rendered


def test_developers_speak_as_the_system_where_the_template_knows_none() -> None:
    chat = [{"role": "developer", "content": "Be brief."}, USER]
    template = ChatTemplate(CHATML, SPECIAL_TOKENS)
    assert template.render(chat) == template.render([SYSTEM, USER])
    assert "developer" in ChatTemplate(CHATML + "{# developer #}", SPECIAL_TOKENS).render(chat)


@pytest.mark.parametrize("arguments", ["{", "[1]", '"x"'])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    call = CALL | {"function": {"name": "weather", "arguments": arguments}}
    with pytest.raises(InvalidRequestError, match="weather") as caught:
        parse_body(GenerateRequest, json.dumps({"messages": [TOOL_CALL | {"tool_calls": [call]}]}).encode())
    assert caught.value.param == "messages"


def test_the_template_may_refuse() -> None:
    with pytest.raises(InvalidRequestError, match="must alternate") as caught:
        ChatTemplate(LLAMA2, SPECIAL_TOKENS).render([USER, USER])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ messages[5].x }}", "{{ messages + 1 }}", "{{ nothing.at.all }}"])
def test_a_template_that_fails_is_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="chat template"):
        ChatTemplate(source, {}).render([USER])


@pytest.mark.parametrize(
    "source", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception.__globals__.os }}"]
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"unsafe|not safely"):
        ChatTemplate(source, {}).render([USER])


def test_a_broken_template_stops_the_start() -> None:
    with pytest.raises(StartupError, match="line 1"):
        ChatTemplate("{% for %}", {})


def _directory(tmp_path: Path, files: dict[str, Any]) -> Path:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "config {{ eos_token }}", "eos_token": "E"}}, "config E"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "named"}]}}, "named"),
        ({"tokenizer_config.json": {"chat_template": "config"}, "chat_template.jinja": "jinja"}, "jinja"),
        (
            {
                "chat_template.json": {"chat_template": "json {{ bos_token }}"},
                "special_tokens_map.json": {"bos_token": {"content": "B"}},
            },
            "json B",
        ),
    ],
)
def test_where_templates_are_found(files: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert Tokenizer.from_directory(_directory(tmp_path, files)).apply_chat_template([USER]) == expected


def test_a_given_template_beats_the_models(tmp_path: Path) -> None:
    directory = _directory(tmp_path, {"chat_template.jinja": "model's", "mine": "mine"})
    assert Tokenizer.from_directory(directory, directory / "mine").apply_chat_template([USER]) == "mine"


def test_without_a_template_messages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Tokenizer.from_directory(_directory(tmp_path, {})).apply_chat_template([USER])
