"""Rows of Parquet files as Ray Data blocks in which every row knows where it comes from.

A block has the columns `src_path` (string), `src_row` (int64, the row's number in its file, from 0) and `input`, a
struct of the input columns with their types unchanged. `ray.data.read_parquet` has no row numbers, so read
tasks here are (file, consecutive row groups), planned from footers alone. Knows nothing of prompts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import ReadTask

from pipeline.listing import is_local, stamp
from pipeline.remote import open_remote
from pipeline.sources import InputFile, limit_rows

TASK_BYTES = 64 * 2**20
BLOCK_ROWS = 50_000


class InputChanged(ValueError):
    """A file is not what it was when the job was checked."""


class InputUnreadable(OSError):
    """A file, or a page of it, cannot be read or decoded."""


@dataclass(frozen=True, slots=True)
class RowRange:
    """Consecutive rows of a file, [start, stop), that begin where a row group does."""

    start: int
    stop: int
    num_bytes: int  # decompressed, all columns


class ParquetRowsSource(Datasource):
    """The first `limit` rows of `files`, in (src_path, src_row) order, each once; of these the `selected`, if given.

    The rows and their provenance depend on the files alone, not on row groups, parallelism or blocks. Ray keeps
    no order of blocks unless told to.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        schema: pa.Schema,
        limit: int | None = None,
        selected: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """`schema`: the columns to read, with the type that each has in all files (`pipeline.schemas`).

        `selected`: by src_path, the numbers of the rows to read, int64, ascending; none of files that are not named.
        """
        super().__init__()
        self._schema = schema
        self._selected = selected
        self._ranges = [
            (file, rows)
            for file, num_rows in zip(files, limit_rows(files, limit), strict=True)
            for rows in row_ranges(file, num_rows)
            if selected is None or len(_between(selected.get(file.src_path), rows.start, rows.stop))
        ]

    def estimate_inmemory_data_size(self) -> int:
        return sum(rows.num_bytes for _, rows in self._ranges)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task a range, whatever parallelism is asked for; for no rows, one that gives an empty block."""
        if not self._ranges:
            empty = block_of(self._schema.empty_table(), "", 0)
            return [ReadTask(lambda: [empty], _metadata(0, 0, ()), empty.schema)]
        return [self._task(file, rows, per_task_row_limit) for file, rows in self._ranges]

    def _task(self, file: InputFile, rows: RowRange, row_limit: int | None) -> ReadTask:
        chosen = None
        if self._selected is not None:
            chosen = _between(self._selected[file.src_path], rows.start, rows.stop)
        num_rows = rows.stop - rows.start if chosen is None else len(chosen)
        metadata = _metadata(num_rows, rows.num_bytes, (file.path,))
        schema = block_of(self._schema.empty_table(), "", 0).schema
        read = partial(_read_blocks, file, rows.start, rows.stop, self._schema, chosen)
        return ReadTask(read, metadata, schema, row_limit)


def _metadata(num_rows: int, num_bytes: int, files: tuple[str, ...]) -> BlockMetadata:
    return BlockMetadata(
        num_rows=num_rows, size_bytes=num_bytes, exec_stats=None, task_exec_stats=None, input_files=files
    )


def row_ranges(file: InputFile, num_rows: int, task_bytes: int = TASK_BYTES) -> list[RowRange]:
    """The first `num_rows` rows of a file, cut at row groups into pieces of about `task_bytes` decompressed."""
    ranges: list[RowRange] = []
    start = stop = size = 0
    for group_rows, group_bytes in zip(file.row_groups, file.row_group_bytes, strict=True):
        if stop >= num_rows:
            break
        if stop > start and size + group_bytes > task_bytes:
            ranges.append(RowRange(start, stop, size))
            start, size = stop, 0
        stop, size = stop + group_rows, size + group_bytes
    if start < min(stop, num_rows):
        ranges.append(RowRange(start, min(stop, num_rows), size))
    return ranges


def read_rows(file: InputFile, start: int, stop: int, columns: pa.Schema) -> pa.Table:
    """Rows [start, stop) of a file as a table of `columns`, in their order and types.

    Raises InputChanged if the file is not the one that was planned, InputUnreadable if a page is corrupt.
    """
    return pa.Table.from_batches(_batches(file, start, stop, columns), columns)


def block_of(table: pa.Table, src_path: str, first_row: int) -> pa.Table:
    """Consecutive rows of a file with their provenance; `first_row` is the number of the first."""
    rows = pa.arange(first_row, first_row + table.num_rows)
    paths = pa.repeat(pa.scalar(src_path, pa.string()), table.num_rows)
    structs = pa.chunked_array(table.to_struct_array(), pa.struct(list(table.schema)))
    return pa.table({"src_path": paths, "src_row": rows, "input": structs})


def _read_blocks(
    file: InputFile, start: int, stop: int, columns: pa.Schema, chosen: np.ndarray | None = None
) -> Iterator[pa.Table]:
    for batch in _batches(file, start, stop, columns):
        block = block_of(pa.Table.from_batches([batch]), file.src_path, start)
        if chosen is not None:
            block = block.take(_between(chosen, start, start + batch.num_rows) - start)
        yield block
        start += batch.num_rows


def _between(numbers: np.ndarray | None, start: int, stop: int) -> np.ndarray:
    """Of ascending numbers those in [start, stop)."""
    if numbers is None:
        return np.empty(0, np.int64)
    return numbers[np.searchsorted(numbers, start) : np.searchsorted(numbers, stop)]


def _batches(file: InputFile, start: int, stop: int, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows [start, stop) in batches of at most BLOCK_ROWS, decoding only the row groups that hold them."""
    if not 0 <= start <= stop <= file.num_rows:
        raise ValueError(f"rows must lie within 0 to {file.num_rows} of {file.path}, got {start} to {stop}")
    left = stop - start
    if not left:
        return
    _check_unchanged(file)
    with _opened(file.path) as parquet:
        for group, first in _groups_from(file, start):
            # One group a call: over several, Arrow cannot read dictionaries nested in structs.
            for batch in parquet.iter_batches(BLOCK_ROWS, row_groups=[group], columns=columns.names):
                rows = batch.slice(max(0, start - first), left)
                first += batch.num_rows
                left -= rows.num_rows
                if rows.num_rows:
                    yield _cast(rows, columns)
                if not left:
                    return
    raise InputChanged(f"{file.path} must have the {file.num_rows} rows its footer states, got {left} fewer")


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    try:
        with _parquet_file(path) as parquet:
            yield parquet
    except (OSError, pa.ArrowException) as error:
        raise InputUnreadable(f"input.path: {path} cannot be read: {error}") from error


@contextmanager
def _parquet_file(path: str) -> Iterator[pq.ParquetFile]:
    if is_local(path):
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            yield parquet
        return
    fs, name = open_remote(path)
    with fs.open(name, "rb") as stream, pq.ParquetFile(stream, page_checksum_verification=True) as parquet:
        yield parquet


def _check_unchanged(file: InputFile) -> None:
    try:
        now = stamp(file.path)
    except FileNotFoundError:
        raise InputChanged(f"{file.path} must be as it was planned, and it is gone") from None
    if (now.size, now.version) != (file.size, file.version):
        raise InputChanged(
            f"{file.path} must be as it was planned ({file.size} bytes, {file.version}), "
            f"got {now.size} bytes, {now.version}; plan into a new output folder"
        )


def _groups_from(file: InputFile, start: int) -> Iterator[tuple[int, int]]:
    """Each row group that ends after row `start`, with the number of its first row."""
    first = 0
    for group, num_rows in enumerate(file.row_groups):
        if first + num_rows > start:
            yield group, first
        first += num_rows


def _cast(rows: pa.RecordBatch, columns: pa.Schema) -> pa.RecordBatch:
    """The rows with the types that hold for all files; almost always they are that already."""
    if not columns.names:
        return rows.select([])
    arrays = [rows.column(field.name) for field in columns]
    cast = [a if a.type == f.type else _cast_array(a, f.type) for a, f in zip(arrays, columns, strict=True)]
    return pa.RecordBatch.from_arrays(cast, schema=columns)


def _cast_array(array: pa.Array, kind: pa.DataType) -> pa.Array:
    return pa.nulls(len(array), kind) if pa.types.is_null(array.type) else array.cast(kind)
