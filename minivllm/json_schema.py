"""JSON schemas that an output is made to follow: read by llguidance, the same way in every process.

The library is optional (`pip install 'mini-vllm[grammar]'`); whoever asks for a schema without it is told so.
"""

from functools import lru_cache

from minivllm.errors import InvalidRequestError

MAX_SCHEMA_LENGTH = 32_768  # characters; compiling that many may take half a second
ANY_OBJECT = '{"type":"object"}'

# Any layout is allowed, but no model may lose itself in blanks for ever.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"


def to_grammar(schema: str) -> str:
    """The grammar of the JSON texts that follow `schema`, in llguidance's form; it is not checked yet.

    Raises `InvalidRequestError` naming `json_schema`: too long, no JSON object, or no llguidance.
    """
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise InvalidRequestError(
            "json_schema needs llguidance, which is not installed here: pip install 'mini-vllm[grammar]'", "json_schema"
        ) from None
    if len(schema) > MAX_SCHEMA_LENGTH:
        raise InvalidRequestError(
            f"json_schema has {len(schema)} characters, at most {MAX_SCHEMA_LENGTH} are allowed", "json_schema"
        )
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
    except ValueError as error:
        raise InvalidRequestError(f"json_schema is not a JSON object: {error}", "json_schema") from None


@lru_cache(maxsize=64)
def check_json_schema(schema: str) -> None:
    """Raises `InvalidRequestError` naming `json_schema` and what is wrong or not supported in it."""
    grammar = to_grammar(schema)
    from llguidance import LLMatcher

    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        raise InvalidRequestError(f"json_schema cannot be followed: {' '.join(messages[0].split())}", "json_schema")
