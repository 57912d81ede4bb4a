"""The form an answer must have: a JSON schema, a regular expression or one of some texts, under vLLM's names.

A form is refused unless all of it can be enforced. So an answer that ends by itself has its form. Knows forms and
llguidance's grammars for them; no tokens, no model. The extra `structured` installs llguidance; without it `problem_of`
says so.
"""

import functools
import json
import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

MISSING = "the extra structured is not installed (llguidance): pip install 'segue[structured]'"
MAX_FORM_CHARS = 2**20
# JSON is written as json.dumps writes it. A small model that may choose white space writes it without end.
_JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}
_ESCAPE = re.compile(r"\\.", re.DOTALL)
_DIGITS = {r"\d": "[0-9]", r"\D": "[^0-9]"}  # classes, which may stand inside other classes
_SYNTAX = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")  # of Rust's regular expressions, which llguidance takes
# Words that a message may contain: they are JSON Schema's, not the row's.
_KEYWORDS = frozenset(
    {"$anchor", "$dynamicAnchor", "$dynamicRef", "$recursiveRef", "additionalItems", "allOf", "anyOf", "contains",
     "dependencies", "dependentRequired", "dependentSchemas", "else", "format", "if", "maxContains", "minContains",
     "not", "oneOf", "propertyNames", "then", "type", "unevaluatedItems", "unevaluatedProperties", "uniqueItems"}
)  # fmt: skip
_NAMED = re.compile(r"\"([$\w]+)\"|\b(oneOf|allOf|anyOf)\b|(?:Unknown|Invalid) (format|type)\b")  # llguidance's


def _json_text(schema: object) -> object:
    """A schema as JSON text. An answer has the properties in the schema's order."""
    if not isinstance(schema, dict):
        return schema
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a JSON schema has JSON's values only: {error}") from None


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class StructuredOutputs(BaseModel, frozen=True):
    """Exactly one of these. The answer has this form and nothing before or after it, unless it ends for its length."""

    model_config = ConfigDict(extra="forbid", strict=True, serialize_by_alias=True)

    json_schema: Annotated[
        str | None,
        BeforeValidator(_json_text),
        WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}], "default": None}),
        Field(alias="json", max_length=MAX_FORM_CHARS),
    ] = None  # a JSON schema: a mapping, or its text
    regex: Annotated[str | None, Field(min_length=1, max_length=MAX_FORM_CHARS)] = (
        None  # of the whole answer, Rust's; \d is 0 to 9
    )
    choice: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...] | None, BeforeValidator(_tuple), Field(min_length=1)
    ] = None  # one of these texts

    @model_validator(mode="after")
    def _check_one(self) -> "StructuredOutputs":
        given = [form for form in (self.json_schema, self.regex, self.choice) if form is not None]
        if len(given) != 1:
            raise ValueError(f"structured_outputs wants exactly one of json, regex and choice, got {len(given)}")
        schema = _object(self.json_schema) if self.json_schema is not None else {}
        if schema is None:
            raise ValueError("structured_outputs.json wants a JSON schema: an object")
        if "x-guidance" in schema:  # llguidance's own key, which changes what is enforced
            raise ValueError("structured_outputs.json must not have x-guidance")
        return self

    @property
    def kind(self) -> str:
        """json, regex or choice."""
        if self.choice is not None:
            return "choice"
        return "json" if self.json_schema is not None else "regex"

    def grammar(self) -> str:
        """The form as llguidance's grammar. Raises ImportError without llguidance, ValueError for unreadable JSON."""
        from llguidance import LLMatcher

        if self.json_schema is not None:
            options: Any = _JSON_OPTIONS
            return LLMatcher.grammar_from_json_schema(self.json_schema, overrides=options)
        if self.choice is not None:
            return LLMatcher.grammar_from_regex("|".join(_SYNTAX.sub(r"\\\g<0>", text) for text in self.choice))
        return LLMatcher.grammar_from_regex(_with_ascii_digits(self.regex or ""))


def _with_ascii_digits(regex: str) -> str:
    r"""`\d` is 0 to 9, as in ECMAScript, JSON schemas and xgrammar; in Rust it is also other scripts' digits."""
    return _ESCAPE.sub(lambda found: _DIGITS.get(found[0], found[0]), regex)


@functools.lru_cache(maxsize=1024)
def problem_of(outputs: StructuredOutputs) -> str | None:
    """Why this form cannot be enforced, without quoting any of it. None if it can be."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        return MISSING
    try:
        is_wrong, messages = LLMatcher.validate_grammar_with_warnings(outputs.grammar())
        if outputs.regex is not None and not is_wrong:  # [A-\d] must not become [A-[0-9]]
            is_wrong, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_regex(outputs.regex))
    except ValueError:  # JSON that llguidance cannot read: NaN, endless numbers, lone surrogates, very deep values
        is_wrong, messages = True, [""]
    if not is_wrong:
        return None
    if outputs.kind == "json":
        named = sorted(_KEYWORDS & {name for found in _NAMED.findall(messages[0]) for name in found})
        what = f"what it says with {', '.join(named)}" if named else "this JSON schema"
        return f"{what} is wrong, or cannot be enforced"
    return "this regular expression is wrong, or not without look-around and back-references"


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
