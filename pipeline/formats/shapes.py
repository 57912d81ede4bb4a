"""What values a column of JSON was seen to have, and the Arrow type that holds all of them unchanged.

JSON's own types stay: a text is a text, whatever it looks like. Integers and numbers with a fraction become doubles if
every integer is exact there. All else that is mixed is refused with both lines. Knows no files and no tables.
"""

from typing import Any

import pyarrow as pa

from segue.pipeline.formats.json_rows import KINDS, JsonNumber
from segue.pipeline.formats.lines import Place, refused
from segue.pipeline.problems import JobRefused, shown

MAX_KEYS = 10_000  # of one object: more are data, not names
_INT64, _UINT64 = (-(2**63), 2**63 - 1), 2**64 - 1
_EXACT = 2**53  # integers up to here are exact as doubles
_SCALARS = {bool: pa.bool_(), str: pa.string()}


class Shape:
    """The values of a column, or of one place inside its values."""

    __slots__ = ("_column", "_fields", "_first", "_high", "_inexact", "_item", "_low", "_outside", "_path")

    def __init__(self, column: str, path: str) -> None:
        """`path`: for messages, `messages[].content`."""
        self._column, self._path = column, path
        self._first: dict[type, Place] = {}  # where a kind of value was seen first
        self._low = self._high = 0
        self._outside: Place | None = None  # where the first integer beyond int64 is
        self._inexact: Place | None = None  # and the first that a double does not hold
        self._item: Shape | None = None
        self._fields: dict[str, Shape] = {}

    def see(self, value: Any, place: Place) -> None:
        """Take a value into account. Raises JobRefused if it does not go with those before."""
        if value is None:
            return
        kind = type(value)
        if kind not in self._first:
            self._begin(value, place)
        if kind is int:
            self._see_integer(value, place)
        elif kind is list:
            self._item = self._item or Shape(self._column, f"{self._path}[]")
            for each in value:
                self._item.see(each, place)
        elif kind is dict:
            for key, each in value.items():
                self._field(key, place).see(each, place)

    def arrow_type(self) -> pa.DataType:
        """Raises JobRefused if no type holds what was seen, or if Parquet cannot store it."""
        kinds = self._first.keys()
        if not kinds:
            return pa.null()
        if JsonNumber in kinds:
            return self._double()
        if int in kinds:
            return self._integer()
        if list in kinds:
            return pa.list_(self._item.arrow_type() if self._item else pa.null())
        return self._struct() if dict in kinds else _SCALARS[next(iter(kinds))]

    def _begin(self, value: Any, place: Place) -> None:
        others = [kind for kind in self._first if {kind, type(value)} != {int, JsonNumber}]
        if others:
            wanted = f"{KINDS[others[0]]}, as in {self._first[others[0]]}"
            raise self._refused(place, KINDS[type(value)], wanted)
        self._first[type(value)] = place

    def _see_integer(self, value: int, place: Place) -> None:
        self._low, self._high = min(self._low, value), max(self._high, value)
        if not -_EXACT <= value <= _EXACT:
            self._inexact = self._inexact or place
            if not _INT64[0] <= value <= _INT64[1]:
                self._outside = self._outside or place

    def _field(self, key: str, place: Place) -> "Shape":
        found = self._fields.get(key)
        if found is None:
            if len(self._fields) == MAX_KEYS:
                raise self._refused(place, f"more than {MAX_KEYS:,} different keys", "objects with the same keys")
            found = self._fields[key] = Shape(self._column, f"{self._path}.{key}")
        return found

    def _integer(self) -> pa.DataType:
        if self._outside is None:
            return pa.int64()
        if self._low < 0 or self._high > _UINT64:
            got, wanted = "an integer beyond int64", "integers that int64 holds, or uint64 if none is negative"
            raise self._refused(self._outside, got, wanted, "string")
        return pa.uint64()

    def _double(self) -> pa.DataType:
        if self._inexact is not None:
            got = "an integer beyond 2**53 among numbers with a fraction"
            raise self._refused(self._inexact, got, "numbers that a double holds exactly", "string")
        return pa.float64()

    def _struct(self) -> pa.DataType:
        if not self._fields:
            raise self._refused(
                self._first[dict], "only empty objects, which Parquet cannot store", "a key in some row"
            )
        return pa.struct([pa.field(key, shape.arrow_type()) for key, shape in self._fields.items()])

    def _refused(self, place: Place, got: str, wanted: str, kept_by: str = "json") -> JobRefused:
        hint = f"--types {shown(self._column)[1:-1]}={kept_by} keeps what is there"
        return refused(place, f"column {shown(self._path)}", got, wanted, hint)
