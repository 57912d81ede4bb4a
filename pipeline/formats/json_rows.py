"""Rows of JSON Lines files, or of files with one array of objects, as Python's `json` reads them, with line numbers.

Values are exact: numbers with a fraction or an exponent keep their text. NaN and Infinity are taken, as Python writes
them. A key that an object has twice is refused, since `json` would keep only its last value. Blank lines are skipped.
Knows no Arrow types.
"""

import json
import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from segue.pipeline.formats.lines import Place, SourceRow, refused, text_lines

WANTED = "JSON Lines, one object a line, or one array of objects"


class JsonNumber(float):
    """A number with a fraction or an exponent, and the text that it was."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> "JsonNumber":
        number = super().__new__(cls, text)
        number.text = text
        return number


class NoJson(ValueError):
    """Text that is not JSON; the message does not quote it."""

    def __init__(self, error: json.JSONDecodeError) -> None:
        super().__init__(f"no JSON ({error.msg} at character {error.colno})")
        self.line = error.lineno  # from 1, in the text that was read


KINDS = {bool: "a boolean", int: "an integer", JsonNumber: "a number", str: "a text", list: "a list", dict: "an object"}


def kind_of(value: Any) -> str:
    """What a value is called in messages."""
    return KINDS.get(type(value), "null")


def json_text(value: Any) -> str:
    """A value of `json_rows` as JSON, with the numbers that it was read with."""
    if isinstance(value, JsonNumber):
        return value.text
    if isinstance(value, list):
        return f"[{', '.join(map(json_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json_text(key)}: {json_text(each)}' for key, each in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)


def json_value(text: str) -> Any:
    """Raises ValueError, which does not quote the text."""
    return _reading(lambda: _DECODER.decode(text))


def json_rows(file: Path, encoding: str) -> Iterator[SourceRow]:
    """Raises JobRefused for what is not JSON, or not an object."""
    lines = enumerate(text_lines(file, encoding), 1)
    for number, line in lines:
        if line.lstrip().startswith("["):
            yield from _rows_of_array(file, number, "".join(chain([line], (each for _, each in lines))))
        elif line.strip():
            yield from _rows_of_lines(file, chain([(number, line)], lines))


def _rows_of_lines(file: Path, lines: Iterator[tuple[int, str]]) -> Iterator[SourceRow]:
    for number, line in lines:
        if line.strip():
            place = Place(file, number)
            try:
                value = json_value(line)
            except ValueError as error:
                raise refused(place, "", str(error), WANTED) from None
            yield _row(place, len(line), value)


def _rows_of_array(file: Path, first: int, text: str) -> Iterator[SourceRow]:
    """The objects of the one array in `text`, whose first line has this number."""
    position = _skip(text, text.index("[") + 1)
    number, counted = first, 0  # the line at the position, and the position up to which lines were counted
    is_end = text.startswith("]", position)
    while not is_end:
        number, counted = number + text.count("\n", counted, position), position
        place = Place(file, number)
        try:
            value, end = _reading(lambda start=position: _DECODER.raw_decode(text, start))
        except NoJson as error:
            raise refused(Place(file, first + error.line - 1), "", str(error), WANTED) from None
        except ValueError as error:
            raise refused(place, "", str(error), WANTED) from None
        yield _row(place, end - position, value)
        position = _skip(text, end)
        is_end = text.startswith("]", position)
        if not is_end and not text.startswith(",", position):
            raise refused(place, "", "something else after an object of the array", "a comma, or the array's end")
        position = position if is_end else _skip(text, position + 1)
    if _skip(text, position + 1) < len(text):
        place = Place(file, number + text.count("\n", counted, position))
        raise refused(place, "", "something after the array", WANTED)


def _row(place: Place, size: int, value: Any) -> SourceRow:
    if not isinstance(value, dict):
        raise refused(place, "", kind_of(value), WANTED)
    return SourceRow(place, size, value)


def _skip(text: str, position: int) -> int:
    """The position of the next character that is no white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _reading(read: Callable[[], Any]) -> Any:
    """What `read` returns. Raises ValueError, which does not quote the text."""
    try:
        return read()
    except json.JSONDecodeError as error:
        raise NoJson(error) from None
    except RecursionError:
        raise ValueError("lists or objects that are nested too deeply") from None
    except ValueError as error:
        is_long = "digits" in str(error)  # Python's limit for integers
        raise ValueError("a number with more than 4,300 digits" if is_long else str(error)) from None


def _number(text: str) -> JsonNumber:
    number = JsonNumber(text)
    if math.isinf(number):
        raise ValueError("a number beyond the range of double")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object that has a key twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=JsonNumber)
