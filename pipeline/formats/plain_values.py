"""Values of Arrow columns as JSON and CSV can hold them. No value is worth a whole file.

Times are ISO 8601 as Arrow writes them, durations whole numbers of their unit, decimals text, bytes base64, maps lists
of pairs. What has no such form becomes null, bytes of a text that are not UTF-8 become U+FFFD, and both are counted.
Knows Arrow; no files.
"""

import base64
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
from pyarrow import types

Plain = Callable[[Any], Any]
_OUT_OF_RANGE = "<value out of range"  # how Arrow writes times that it cannot
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
_UNREADABLE = (pa.ArrowException, ValueError, OverflowError, KeyError, TypeError)


class PlainValues:
    """Makes plain values, and counts those that it had to change."""

    def __init__(self, *, keeps_nan: bool) -> None:
        """`keeps_nan`: the format has NaN and infinity."""
        self.num_changed = 0
        self._keeps_nan = keeps_nan

    def rows(self, table: pa.Table) -> Iterator[tuple[Any, ...]]:
        """The rows of a table, whose columns may have the same name."""
        return zip(*(self.column(column) for column in table.columns), strict=True)

    def column(self, column: pa.ChunkedArray) -> list[Any]:
        """The values of a column."""
        try:
            return self._values(column, None)
        except _UNREADABLE:  # one value has no Python form; most often a text is not UTF-8
            return [value for index in range(len(column)) for value in self._value(column.slice(index, 1))]

    def _value(self, column: pa.ChunkedArray) -> list[Any]:
        try:
            return self._values(column, pa.large_binary())
        except _UNREADABLE:
            return [self._lost()]

    def _values(self, column: pa.ChunkedArray, text: pa.DataType | None) -> list[Any]:
        """`text`: the type as which texts are read."""
        kind = _readable(column.type, text)
        plain = self._plain(column.type)
        values = (column if kind == column.type else column.cast(kind)).to_pylist()
        return values if plain is None else [None if value is None else plain(value) for value in values]

    def _plain(self, kind: pa.DataType) -> Plain | None:
        """What is done with values that are not null; None if nothing is."""
        if types.is_dictionary(kind):
            return self._plain(kind.value_type)
        if isinstance(kind, pa.BaseExtensionType):
            return self._plain(kind.storage_type)
        if _is_list(kind):
            return partial(self._list, self._plain(kind.value_type))
        if types.is_struct(kind):
            return partial(self._struct, {field.name: self._plain(field.type) for field in kind})
        if types.is_map(kind):
            return partial(self._pairs, self._plain(kind.key_type), self._plain(kind.item_type))
        found = {_is_text: self._text, types.is_floating: self._float, types.is_timestamp: self._timestamp,
                 types.is_temporal: self._time, types.is_decimal: str, _is_bytes: _base64}  # fmt: skip
        return next((plain for fits, plain in found.items() if fits(kind)), None)

    def _lost(self) -> None:
        self.num_changed += 1

    def _text(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        text = value.decode("utf-8", "replace")
        self.num_changed += text.encode("utf-8") != value
        return text

    def _float(self, value: float) -> float | None:
        return float(value) if self._keeps_nan or math.isfinite(value) else self._lost()

    def _time(self, value: Any) -> Any:
        return self._lost() if isinstance(value, str) and value.startswith(_OUT_OF_RANGE) else value

    def _timestamp(self, value: str) -> str | None:
        found = self._time(value)
        if found is None:
            return None
        head, point, tail = found.replace(" ", "T", 1).partition(".")
        digits = tail[: len(tail) - len(tail.lstrip("0123456789"))]
        fraction = digits.rstrip("0")
        return f"{head}{point if fraction else ''}{fraction}{tail[len(digits) :]}"

    def _list(self, plain: Plain | None, values: list[Any]) -> list[Any]:
        return [value if value is None or plain is None else plain(value) for value in values]

    def _struct(self, fields: dict[str, Plain | None], value: dict[str, Any]) -> dict[str, Any]:
        return {name: self._list(fields[name], [each])[0] for name, each in value.items()}

    def _pairs(self, key: Plain | None, item: Plain | None, pairs: Any) -> list[list[Any]]:
        return [[*self._list(key, [one]), *self._list(item, [other])] for one, other in pairs]


def _readable(kind: pa.DataType, text: pa.DataType | None) -> pa.DataType:
    """The type as which values are read: of times Arrow's own text, since Python has fewer years and digits."""
    if types.is_dictionary(kind):
        return _readable(kind.value_type, text)
    if isinstance(kind, pa.BaseExtensionType):
        return _readable(kind.storage_type, text)
    if _is_list(kind):
        return pa.large_list(_readable(kind.value_type, text))
    if types.is_struct(kind):
        return pa.struct([pa.field(field.name, _readable(field.type, text)) for field in kind])
    if types.is_map(kind):
        return pa.map_(_readable(kind.key_type, text), _readable(kind.item_type, text))
    if types.is_duration(kind):
        return pa.int64()
    if types.is_temporal(kind) and not types.is_interval(kind):
        return pa.string()
    return text if text is not None and _is_text(kind) else kind


def _is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    is_any = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(each(kind) for each in is_any)


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def json_line(value: dict[str, Any]) -> str:
    """A line of JSON Lines, with its line break. Other characters that some readers take for line ends are escaped."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).translate(_LINE_ENDS) + "\n"
