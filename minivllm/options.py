"""Reads the options declared in config.py from four places: flag > MINIVLLM_* variable > --config file > default."""

import argparse
import json
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from minivllm.config import EngineConfig, FrontendConfig, ModelConfig, Options, ServeConfig

ENV_PREFIX = "MINIVLLM_"
_GROUPS: tuple[tuple[str, type[Options]], ...] = (
    ("model", ModelConfig),
    ("engine", EngineConfig),
    ("HTTP", FrontendConfig),
    ("processes", ServeConfig),
)
_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH", str: "TEXT", tuple: "A,B,…"}

OptionsT = TypeVar("OptionsT", bound=Options)


def load_config(argv: Sequence[str], prog: str, environ: Mapping[str, str] = os.environ) -> ServeConfig:
    """The options of a server process. A bad one ends the process: one line on stderr, exit code 2."""
    return load_options(ServeConfig, argv, prog, environ)


def load_options(
    kind: type[OptionsT], argv: Sequence[str], prog: str, environ: Mapping[str, str] = os.environ
) -> OptionsT:
    """A `kind` from flags, environment, config file and defaults. Exits like `load_config`; --help exits with 0."""
    parser = _make_parser(kind, prog)
    flags = vars(parser.parse_args(argv))
    config_file = flags.pop("config", None) or environ.get(f"{ENV_PREFIX}CONFIG")
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}  # field name → where its value comes from, for the error message
    if config_file:
        try:
            values.update(_read_file(kind, Path(config_file)))
        except (OSError, ValueError) as error:
            parser.error(f"--config {config_file}: {error}")
        origins.update({name: f"{name} in {config_file}" for name in values})
    for name in kind.model_fields:
        if text := environ.get(env_name(name)):
            values[name], origins[name] = text, env_name(name)
        if name in flags:
            values[name], origins[name] = flags[name], _spelling(name)
    values = {name: _split(kind.model_fields[name], value) for name, value in values.items()}
    try:
        return kind(**values)
    except ValidationError as error:
        parser.error("; ".join(_explain(kind, details, origins) for details in error.errors(include_url=False)))


def env_name(field_name: str) -> str:
    """The environment variable of an option: `max_model_len` → `MINIVLLM_MAX_MODEL_LEN`."""
    return ENV_PREFIX + _public(field_name).upper()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _make_parser(kind: type[Options], prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        usage=f"{prog} {'[MODEL] ' if 'model' in kind.model_fields else ''}[options]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120),
        epilog="Every option can also be set by MINIVLLM_<NAME> in the environment, or as name: value in the config "
        "file. A flag beats the environment, the environment beats the file.",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="file of options (YAML or JSON)")
    seen: set[str] = set()
    for title, declared_in in (*_GROUPS, ("command", kind)):
        if not issubclass(kind, declared_in):
            continue
        group = parser.add_argument_group(title)
        for name, field in declared_in.model_fields.items():
            if name not in seen:
                _add_argument(group, name, field)
                seen.add(name)
    return parser


def _add_argument(group: Any, name: str, field: FieldInfo) -> None:
    text = (field.description or "").replace("%", "%%")
    kind = _plain_type(field.annotation)
    if kind is not bool and field.default not in (None, ()):
        default = field.default
        text += f" [{','.join(map(str, default)) if isinstance(default, tuple) else default}]"
    if name == "model":
        group.add_argument("model", metavar="MODEL", nargs="?", help=text)
    elif kind is bool:
        text += " [on]" if field.default else ""
        group.add_argument(
            _spelling(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, dest=name, help=text
        )
    elif typing.get_origin(kind) is Literal:
        metavar = "{" + ",".join(typing.get_args(kind)) + "}"
        group.add_argument(_spelling(name), metavar=metavar, dest=name, help=text)
    else:
        metavar = _METAVARS[typing.get_origin(kind) or kind]
        nargs = "+" if _takes_several(field) else None
        group.add_argument(_spelling(name), metavar=metavar, nargs=nargs, dest=name, help=text)


def _takes_several(field: FieldInfo) -> bool:
    """Whether the flag of a tuple takes several words, in place of one with commas."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and extra.get("several") is True


def _spelling(name: str) -> str:
    return "MODEL" if name == "model" else "--" + _public(name).replace("_", "-")


def _public(name: str) -> str:
    """`json_` → `json`: a field cannot have a name that pydantic's models use."""
    return name.rstrip("_")


def _plain_type(annotation: Any) -> Any:
    """`Annotated[int, …] | None` → `int`."""
    if typing.get_origin(annotation) in (Union, UnionType):
        return _plain_type(next(arm for arm in typing.get_args(annotation) if arm is not type(None)))
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _read_file(kind: type[Options], path: Path) -> dict[str, Any]:
    """The options in a YAML or JSON file; names in snake_case or kebab-case. Raises OSError, ValueError."""
    text = path.read_text(encoding="utf-8")
    content = json.loads(text) if path.suffix == ".json" else _parse_yaml(text)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"expected `name: value` lines, got a {type(content).__name__}")
    fields = {_public(name): name for name in kind.model_fields}
    spelled = {str(name).replace("-", "_"): value for name, value in content.items()}
    options = {fields.get(name, name): value for name, value in spelled.items()}
    unknown = sorted(options.keys() - (ServeConfig.model_fields.keys() | kind.model_fields.keys()))
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)}")
    return {name: value for name, value in options.items() if name in kind.model_fields}


def _parse_yaml(text: str) -> Any:
    import yaml  # here, because only a config file written by hand needs it

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _split(field: FieldInfo, value: Any) -> Any:
    """A tuple in a flag or variable is written a,b."""
    if _takes_several(field):
        value = " ".join(value) if isinstance(value, list) else value.replace(",", " ")
        return value.split()
    if typing.get_origin(_plain_type(field.annotation)) is tuple and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _explain(kind: type[Options], details: ErrorDetails, origins: Mapping[str, str]) -> str:
    message = details["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]
    if not details["loc"]:  # a rule over several options: its message names them
        return message
    name = str(details["loc"][0])
    given = f", got {details['input']!r}" if kind.model_fields[name].repr else ""  # secrets are declared repr=False
    return f"{origins.get(name, name)}: {message.replace('Input should be', 'must be', 1)}{given}"
