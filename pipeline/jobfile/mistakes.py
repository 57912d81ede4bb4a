"""From pydantic's errors to problems people can act on: the key they wrote, what they gave, what is wanted.

Knows pydantic's error types and the shape of models; nothing of YAML or of what a job means.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from segue.pipeline.problems import Problem, has_credentials, nearest, shown

JobPath = tuple[str | int, ...]  # keys and list positions from the top
Where = Callable[[JobPath], str]  # the place in a file that a path comes from
_WANTED = {
    "string_type": "a string; quote it if it looks like a number or a date",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "mapping_type": "a mapping of keys",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_short": "a list of at least 1 item",  # no list of a job must have more
    "missing": "a value for this required key",
}
_PREFIXES = (("Input should be ", ""), ("greater", "a value greater"), ("less", "a value less"))


def problems_of(
    error: ValidationError, values: Mapping[str, object], model: type[BaseModel], where: Where
) -> list[Problem]:
    """One problem for each key of `values` that `error` is about, in the order of the errors."""
    by_path: dict[JobPath, list[ErrorDetails]] = {}
    superseded: set[JobPath] = set()  # what failed further inside tells more than these
    for details in error.errors(include_url=False):
        path = _written_path(details, values)
        by_path.setdefault(path, []).append(details)
        # The location is longer where pydantic tried the members of a union; lists lose their wrong items.
        if len(path) < len(details["loc"]) or details["type"] == "too_short":
            superseded.add(path)
    return [
        _problem(path, group, model, where)
        for path, group in by_path.items()
        if not (path in superseded and any(other[: len(path)] == path and other != path for other in by_path))
    ]


def _written_path(details: ErrorDetails, values: object) -> JobPath:
    """The error's location without what pydantic adds to it: names of union members, tuples made of a string."""
    path: JobPath = ()
    for part in details["loc"]:
        is_position = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if is_position or (isinstance(values, dict) and part in values):
            values, path = values[part], (*path, part)  # type: ignore[index]
    if details["type"] == "missing":
        path = (*path, details["loc"][-1])
    return path


def _problem(path: JobPath, group: list[ErrorDetails], model: type[BaseModel], where: Where) -> Problem:
    key, first = ".".join(str(part) for part in path), group[0]
    if first["type"] == "extra_forbidden":
        known = sorted(_keys_at(model, path[:-1]))
        hint = nearest(str(path[-1]), known)
        wanted = "a known key" if hint or not known else f"one of {', '.join(known)}"
        return Problem(key, "an unknown key", wanted, hint, where(path))
    if first["type"] == "missing":
        return Problem(key, "nothing", _WANTED["missing"], where=where(path[:-1]))
    wanted = " or ".join(dict.fromkeys(_wanted(details) for details in group))
    return Problem(key, _got(first), wanted, where=where(path))


def _got(details: ErrorDetails) -> str:
    given = details["input"]
    if isinstance(given, str) and has_credentials(given):
        return "a URL with credentials (not shown)"
    # Checks over several keys say themselves what they got.
    return "" if details["type"] == "value_error" or details["type"] == "sizes" else shown(given)


def _wanted(details: ErrorDetails) -> str:
    if details["type"] in _WANTED:
        return _WANTED[details["type"]]
    text = details["msg"].removeprefix("Value error, ")
    for prefix, replacement in _PREFIXES:
        if text.startswith(prefix):
            text = replacement + text[len(prefix) :]
    return text


def _keys_at(model: type[BaseModel], path: JobPath) -> set[str]:
    """The keys that the section at `path` may have; empty where anything goes."""
    models = [model]
    for part in path:
        if isinstance(part, str):
            fields = [named for each in models if (named := _fields_of(each).get(part))]
            models = [found for field in fields for found in models_in(field.annotation)]
    return {name for each in models for name in _fields_of(each)}


def _fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """By the names that a file has for them."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """The sections that a value of this type may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)
