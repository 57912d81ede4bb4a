"""The types of columns that a user names: `id=string`, `tags=list<string>`, `when=timestamp[us, tz=UTC]`, `extra=json`.

Names are Arrow's, so the type that a conversion prints may be given to the next. Knows names; no values.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from segue.pipeline.problems import JobRefused, Problem, nearest, shown

WANTED = (
    "COLUMN=TYPE with string, json, bool, int8 to int64, uint8 to uint64, float, double, date32, time64[us], "
    "timestamp[us], timestamp[us, tz=UTC], duration[us], decimal128(P, S), binary, list<TYPE>, struct<NAME: TYPE, ...>"
)
_OWN_NAMES = {"text": "string", "integer": "int64", "int": "int64", "number": "double", "boolean": "bool",
              "date": "date32", "timestamp": "timestamp[us]", "float32": "float", "float64": "double"}  # fmt: skip
_NESTED = re.compile(r"(list|large_list|struct)<(.*)>", re.DOTALL)
_ZONED = re.compile(r"timestamp\[(s|ms|us|ns), tz=([\w/+:-]+)\]")
_DECIMAL = re.compile(r"decimal(?:128|256)?\((\d+), ?(\d+)\)")
_OPEN, _CLOSE = "<([", ">)]"


@dataclass(frozen=True, slots=True)
class ColumnType:
    """A type of `--types`."""

    arrow: pa.DataType
    is_json: bool = False  # values become their JSON text


def parse_types(options: Iterable[str]) -> dict[str, ColumnType]:
    """Columns and types of options `NAME=TYPE`, or several with commas between them. Raises JobRefused."""
    found: dict[str, ColumnType] = {}
    for option in options:
        for name, kind in _pairs(option):
            if name in found:
                raise JobRefused([Problem("--types", f"column {shown(name)} twice", "each column once")])
            found[name] = _column_type(kind, option)
    return found


def check_known(types: Mapping[str, ColumnType], columns: Iterable[str]) -> None:
    """Raises JobRefused for a type of a column that is not there."""
    names = list(columns)
    wrong = [name for name in types if name not in names]
    if wrong:
        wanted = f"columns of the data: {', '.join(map(shown, names[:20]))}"
        raise JobRefused([Problem("--types", f"column {shown(wrong[0])}", wanted, nearest(wrong[0], names))])


def _pairs(option: str) -> Iterator[tuple[str, str]]:
    name = ""
    for part in _split(option):
        before, equals, kind = part.partition("=")
        name += before
        if equals:
            yield name.strip(), kind.strip()
            name = ""
        else:  # the comma is one of the column's name
            name += ","
    if name:
        raise JobRefused([Problem("--types", shown(option), WANTED)])


def _split(text: str) -> list[str]:
    """The parts between commas that are in no bracket."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in _OPEN) - (char in _CLOSE)
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _column_type(name: str, option: str) -> ColumnType:
    if name == "json":
        return ColumnType(pa.string(), is_json=True)
    try:
        return ColumnType(_arrow_type(name))
    except (ValueError, pa.ArrowException):
        raise JobRefused([Problem("--types", shown(option), WANTED)]) from None


def _arrow_type(name: str) -> pa.DataType:
    """Raises ValueError, ArrowInvalid."""
    name = name.strip()
    if nested := _NESTED.fullmatch(name):
        return _nested_type(nested[1], nested[2])
    if zoned := _ZONED.fullmatch(name):
        return pa.timestamp(zoned[1], zoned[2])
    if decimal := _DECIMAL.fullmatch(name):
        precision, scale = int(decimal[1]), int(decimal[2])
        return pa.decimal128(precision, scale) if precision <= 38 else pa.decimal256(precision, scale)
    found = pa.type_for_alias(_OWN_NAMES.get(name, name))
    if pa.types.is_float16(found) or pa.types.is_interval(found) or "view" in str(found):
        raise ValueError(name)
    return found


def _nested_type(outer: str, inner: str) -> pa.DataType:
    if outer == "struct":
        fields = [part.partition(":") for part in _split(inner)]
        if not all(colon and field.strip() for field, colon, _ in fields):
            raise ValueError(inner)
        return pa.struct([pa.field(field.strip(), _arrow_type(kind)) for field, _, kind in fields])
    item = _arrow_type(re.sub(r"^\s*(?:item|element): ", "", inner))
    return pa.list_(item) if outer == "list" else pa.large_list(item)
