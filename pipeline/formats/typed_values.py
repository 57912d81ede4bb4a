"""Values of JSON and texts of CSV as values of an Arrow type: exactly, or not at all.

Texts are parsed for every type, since CSV has nothing else, and JSON writes dates, decimals and bytes as texts. Lists
and structs may be JSON text, bytes are base64. Knows values; no rows and no files.
"""

import base64
import math
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

import pyarrow as pa
from pyarrow import types

from segue.pipeline.formats.column_types import ColumnType
from segue.pipeline.formats.json_rows import JsonNumber, json_text, json_value, kind_of

Convert = Callable[[Any], Any]
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_TIME = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9])(?:\.([0-9]{1,9}))?")
_BOOLEANS = {"true": True, "false": False}
_MAX_FLOAT, _MAX_DOUBLE = 3.4028234663852886e38, sys.float_info.max


class BadValue(ValueError):
    """A value that a type does not hold; the message does not quote it."""


def converter(kind: ColumnType, *, is_csv: bool) -> Convert:
    """A function from a value that is not null to what `pa.array` takes for this type. It raises BadValue."""
    if kind.is_json:
        return _checked_json if is_csv else json_text
    return _converter(kind.arrow)


def _converter(kind: pa.DataType) -> Convert:
    if types.is_list(kind) or types.is_large_list(kind):
        return partial(_list, kind, _converter(kind.value_type))
    if types.is_struct(kind):
        return partial(_struct, kind, {field.name: _converter(field.type) for field in kind})
    for fits, function in _FUNCTIONS:
        if fits(kind):
            return partial(function, kind)
    raise ValueError(f"no values of {kind} can be read")


def _bad(kind: pa.DataType, value: Any) -> BadValue:
    return BadValue(f"{kind_of(value)} that is not {kind}" if isinstance(value, str) else kind_of(value))


def _checked_json(text: str) -> str:
    try:
        json_value(text)
    except ValueError as error:
        raise BadValue(str(error)) from None
    return text


def _text(kind: pa.DataType, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict):
        raise _bad(kind, value)
    return json_text(value)


def _integer(kind: pa.DataType, value: Any) -> int:
    number = value
    if isinstance(value, str) and _INTEGER.fullmatch(value) and len(value) < 30:
        number = int(value)
    if type(number) is not int:
        raise _bad(kind, value)
    bits = kind.bit_width - types.is_signed_integer(kind)
    if not (-(2**bits) if types.is_signed_integer(kind) else 0) <= number < 2**bits:
        raise BadValue(f"an integer beyond {kind}")
    return number


def _float(kind: pa.DataType, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _bad(kind, value)
    if isinstance(value, str) and not (_NUMBER.fullmatch(value) or _NOT_FINITE.fullmatch(value)):
        raise _bad(kind, value)
    if isinstance(value, int) and abs(value) > 2**53:
        raise BadValue("an integer beyond 2**53, which a double does not hold exactly")
    number = float(value)
    is_infinite = isinstance(value, float) or _NOT_FINITE.fullmatch(str(value))
    if abs(number) > (_MAX_FLOAT if types.is_float32(kind) else _MAX_DOUBLE) and not (
        is_infinite and math.isinf(number)
    ):
        raise BadValue(f"a number beyond {kind}")
    return number


def _boolean(kind: pa.DataType, value: Any) -> bool:
    found = _BOOLEANS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise _bad(kind, value)
    return found


def _moment(kind: pa.DataType, value: Any) -> int:
    """Dates and timestamps: ISO 8601, read by Arrow, which takes no finer time than the type has."""
    if not isinstance(value, str):
        raise _bad(kind, value)
    try:
        return pa.scalar(value).cast(kind).value
    except pa.ArrowException:
        zone = " with an offset or Z" if types.is_timestamp(kind) and kind.tz else ""
        raise BadValue(f"a text that is not {kind}{zone}") from None


def _time_of_day(kind: pa.DataType, value: Any) -> int:
    """In units of the type; Arrow casts no text to a time."""
    found = _TIME.fullmatch(value) if isinstance(value, str) else None
    digits = {"s": 0, "ms": 3, "us": 6, "ns": 9}[kind.unit]
    fraction = ((found[4] or "") if found else "").rstrip("0")
    if found is None or len(fraction) > digits:
        raise BadValue(f"{kind_of(value)} that is not {kind}, HH:MM:SS with {digits} more digits at most")
    seconds = (int(found[1]) * 60 + int(found[2])) * 60 + int(found[3])
    return seconds * 10**digits + int(fraction.ljust(digits, "0") or 0)


def _duration(kind: pa.DataType, value: Any) -> int:
    return _integer(pa.int64(), value)  # in its unit


def _decimal(kind: pa.DataType, value: Any) -> Decimal:
    text = str(value) if type(value) is int else value.text if isinstance(value, JsonNumber) else value
    if not isinstance(text, str) or not _NUMBER.fullmatch(text):
        raise _bad(kind, value)
    try:
        pa.scalar(Decimal(text), kind)
    except (pa.ArrowException, ArithmeticError):
        raise BadValue(f"a number with more digits than {kind} has") from None
    return Decimal(text)


def _bytes(kind: pa.DataType, value: Any) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (ValueError, TypeError):
        raise BadValue(f"{kind_of(value)} that is not base64, as {kind} is written") from None


def _nothing(kind: pa.DataType, value: Any) -> None:
    raise BadValue(f"{kind_of(value)} in a column of nulls")


def _list(kind: pa.DataType, convert: Convert, value: Any) -> list[Any]:
    items = _parsed(kind, value)
    if not isinstance(items, list):
        raise _bad(kind, value)
    return [None if item is None else convert(item) for item in items]


def _struct(kind: pa.DataType, converts: dict[str, Convert], value: Any) -> dict[str, Any]:
    fields = _parsed(kind, value)
    if not isinstance(fields, dict):
        raise _bad(kind, value)
    if fields.keys() - converts.keys():
        raise BadValue(f"an object with keys that {str(kind)[:200]} lacks")
    return {name: None if each is None else converts[name](each) for name, each in fields.items()}


def _parsed(kind: pa.DataType, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json_value(value)
    except ValueError as error:
        raise BadValue(f"{error}, wanted JSON of {str(kind)[:200]}") from None


_FUNCTIONS: list[tuple[Callable[[pa.DataType], bool], Callable[[pa.DataType, Any], Any]]] = [
    (lambda kind: types.is_string(kind) or types.is_large_string(kind), _text),
    (types.is_integer, _integer),
    (types.is_floating, _float),
    (types.is_boolean, _boolean),
    (lambda kind: types.is_timestamp(kind) or types.is_date(kind), _moment),
    (types.is_time, _time_of_day),
    (types.is_duration, _duration),
    (types.is_decimal, _decimal),
    (lambda kind: types.is_binary(kind) or types.is_large_binary(kind), _bytes),
    (types.is_null, _nothing),
]
