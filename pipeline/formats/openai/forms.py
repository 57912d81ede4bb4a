"""The form that a request wants its answer to have, under the names of OpenAI and of vLLM, old and new.

Knows names; whether a form can be enforced is for the plan.
"""

from collections.abc import Mapping
from typing import Any

_OLD_NAMES = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice"}  # vLLM's before 0.12
_NOT_SUPPORTED = ("guided_grammar", "structural_tag")
FORMS = ("response_format", "structured_outputs", *_OLD_NAMES, "guided_json_object", "guided_grammar", "structural_tag")
_OBJECT = {"json": {"type": "object"}}
# Options of vLLM's `structured_outputs` that no answer of Segue depends on: its JSON has no optional white space.
_OPTIONS = frozenset({"disable_fallback", "disable_any_whitespace", "disable_additional_properties"})


class BadForm(ValueError):
    """The message begins with the parameter's name and does not quote the request."""


def form_of(asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The form as Segue's `structured_outputs`; None for plain text. Raises BadForm."""
    given = [name for name in FORMS if asked.get(name) not in (None, False)]
    found = {name: form for name in given if (form := _form(name, asked[name])) is not None}
    if len(found) > 1:
        raise BadForm(f"{', '.join(found)}: wanted only one of them")
    return next(iter(found.values()), None)


def _form(name: str, value: Any) -> dict[str, Any] | None:
    if name in _NOT_SUPPORTED:
        raise BadForm(f"{name}: not supported")
    if name == "response_format":
        return _response_format(value)
    if name == "structured_outputs":
        return _structured_outputs(value)
    return _OBJECT if name == "guided_json_object" else {_OLD_NAMES[name]: value}


def _response_format(value: Any) -> dict[str, Any] | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise BadForm("response_format.type: wanted text, json_object or json_schema")
    if (kind == "json_schema") != (value.get("json_schema") is not None):
        raise BadForm("response_format: json_schema belongs to type json_schema, and is needed there")
    if kind == "text":
        return None
    return _OBJECT if kind == "json_object" else _schema(value["json_schema"])


def _schema(value: Any) -> dict[str, Any]:
    """`strict` and `description` change nothing: here a schema is always strict."""
    schema = value.get("schema") if isinstance(value, dict) else None
    if not isinstance(schema, dict | None) or not isinstance(value, dict):
        raise BadForm("response_format.json_schema: wanted an object with a schema that is an object")
    return {"json": schema} if schema else _OBJECT


def _structured_outputs(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        raise BadForm("structured_outputs: wanted an object")
    asked = {key: each for key, each in value.items() if each not in (None, False) and key not in _OPTIONS}
    wrong = [key for key in asked if key not in ("json", "regex", "choice", "json_object")]
    if wrong:
        what = ", ".join(key for key in wrong if key in ("grammar", "structural_tag", "whitespace_pattern"))
        raise BadForm(
            f"structured_outputs: {what or 'a key'} is not supported, wanted json, regex, choice or json_object"
        )
    if "json_object" in asked:
        return _OBJECT | {key: each for key, each in asked.items() if key != "json_object"}
    return asked or None
