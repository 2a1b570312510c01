"""Templates of the common families render exactly as transformers renders them."""

import json
from pathlib import Path
from typing import Any

import pytest

from frontend.chat_template import ChatTemplate
from frontend.tokenizer import Tokenizer
from minivllm.errors import InvalidRequestError, StartupError
from tests.unit.frontend.conftest import CHATML, byte_level

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
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
ZEPHYR = """{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
    {% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
    {% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
    {% endif %}
    {% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
    {% endif %}
{% endfor %}"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "qwen": QWEN, "zephyr": ZEPHYR}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER, ASSISTANT = {"role": "user", "content": " Hi <b>é</b> & 'you' "}, {"role": "assistant", "content": "Hello!"}
CHATS = [[USER], [{"role": "system", "content": "Be brief."}, USER], [USER, ASSISTANT, USER]]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(name: str, chat: list[dict[str, str]], tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **SPECIAL_TOKENS)
    expected = theirs.apply_chat_template(
        chat, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate(TEMPLATES[name], SPECIAL_TOKENS).render(chat) == expected


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
