"""Plain JSON values from rows: what a chat template may be given beside text.

Knows values only; no message, no template.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from segue.workers.errors import RowError, RowErrorCode

MAX_DEPTH = 64  # of lists and mappings in each other


def json_of(text: str, what: str) -> object:
    """The value of a JSON text. Raises RowError(BAD_MESSAGES)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _bad(f"{what} are a text that is not JSON") from None


def plain(value: object, what: str, depth: int = 0) -> Any:
    """`value` with lists and dicts of its own. Raises RowError(BAD_MESSAGES) for values that JSON does not have."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if depth == MAX_DEPTH:
        raise _bad(f"{what} has lists and mappings more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise _bad(f"{what} has a key that is not text")
        return {key: plain(each, what, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, what, depth + 1) for each in value]
    raise _bad(f"{what} has a value of type {type(value).__name__}, wanted values of JSON's kinds")


def strings_in(value: Any) -> Iterator[str]:
    """All strings in a JSON value, also keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield key
            yield from strings_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from strings_in(each)


def with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The JSON value with each string changed, also keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): with_strings(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [with_strings(each, change) for each in value]
    return value


def without_nulls(value: Any) -> Any:
    """The value without the nulls in its mappings. A struct of Arrow has null where a mapping lacks the key."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(each) for each in value]
    return value


def _bad(message: str) -> RowError:
    return RowError(RowErrorCode.BAD_MESSAGES, message)
