"""Rows of text files as Arrow tables of a schema. A value that does not fit its type is named by file, line and column.

Knows rows and types; nothing of CSV, JSON or Parquet.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from segue.pipeline.formats.column_types import ColumnType
from segue.pipeline.formats.lines import SourceRow, refused
from segue.pipeline.formats.typed_values import BadValue, Convert, converter
from segue.pipeline.problems import JobRefused, shown

BATCH_ROWS, BATCH_CHARS = 1024, 16 * 2**20
_NOT_ARROW = (pa.ArrowException, ValueError, TypeError, OverflowError)


def tables_of(rows: Iterable[SourceRow], types: Mapping[str, ColumnType], *, is_csv: bool) -> Iterator[pa.Table]:
    """The rows in tables with these columns. Raises JobRefused."""
    columns = [_Column(name, kind.arrow, converter(kind, is_csv=is_csv)) for name, kind in types.items()]
    schema = pa.schema([pa.field(column.name, column.kind) for column in columns])
    for batch in _batches(rows):
        yield pa.Table.from_arrays([column.array(batch) for column in columns], schema=schema)


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    kind: pa.DataType
    convert: Convert

    def array(self, rows: list[SourceRow]) -> pa.Array | pa.ChunkedArray:
        try:
            return self._array(rows)
        except _NOT_ARROW:
            raise self._refused(rows) from None

    def _array(self, rows: list[SourceRow]) -> pa.Array | pa.ChunkedArray:
        found = [row.values.get(self.name) for row in rows]
        return pa.array([None if value is None else self.convert(value) for value in found], self.kind)

    def _refused(self, rows: list[SourceRow]) -> JobRefused:
        """The first row that has no place in the column."""
        for row in rows:
            try:
                self._array([row])
            except _NOT_ARROW as error:
                wanted = str(self.kind)[:200]
                return refused(row.place, f"column {shown(self.name)}", _reason(error, wanted), wanted)
        raise RuntimeError("rows that fit one by one did not fit together")


def _reason(error: Exception, wanted: str) -> str:
    if isinstance(error, BadValue):
        return str(error)
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair, which is no text"
    return f"a value that is not {wanted}"


def _batches(rows: Iterable[SourceRow]) -> Iterator[list[SourceRow]]:
    batch: list[SourceRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row.size
        if len(batch) == BATCH_ROWS or size > BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
