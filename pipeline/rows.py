"""Rows of Parquet files as Ray Data blocks in which every row knows where it comes from.

A block has the columns `src_path` (string), `src_row` (int64, the row's number in its file, from 0) and `input`, a
struct of the input columns with their types unchanged. `ray.data.read_parquet` has no row numbers, so read
tasks here are (file, consecutive row groups), planned from footers alone. Knows nothing of prompts.
"""

from collections.abc import Iterator, Sequence
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
from pipeline.sources import InputFile, RowNumbers, rows_between

TASK_BYTES = 64 * 2**20
BLOCK_ROWS = 50_000


class InputChanged(ValueError):
    """A file is not what it was when the job was checked."""


class InputUnreadable(OSError):
    """A file, or a page of it, cannot be read or decoded."""


@dataclass(frozen=True, slots=True)
class RowRange:
    """Consecutive rows of a file, [start, stop), that begin where a row group does, or the job's rows."""

    start: int
    stop: int
    num_bytes: int  # decompressed, all columns


class ParquetRowsSource(Datasource):
    """Rows of `files`, each once, in (src_path, src_row) order.

    The rows and their provenance depend on the files alone, not on row groups, parallelism or blocks. Ray keeps
    no order of blocks unless told to.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        schema: pa.Schema,
        rows: Sequence[RowNumbers] | None = None,
    ) -> None:
        """`schema`: the columns to read, with the type that each has in all files (`pipeline.schemas`).

        `rows`: of each file the numbers of those to read; all of them if it is left out.
        """
        super().__init__()
        self._schema = schema
        self._pieces = [
            (file, piece, rows_between(wanted, piece.start, piece.stop))
            for file, wanted in zip(files, rows or [range(file.num_rows) for file in files], strict=True)
            for piece in _pieces(file, wanted)
        ]

    def estimate_inmemory_data_size(self) -> int:
        return sum(piece.num_bytes for _, piece, _ in self._pieces)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task a range, whatever parallelism is asked for; for no rows, one that gives an empty block."""
        if not self._pieces:
            empty = block_of(self._schema.empty_table(), "", 0)
            return [ReadTask(lambda: [empty], _metadata(0, 0, ()), empty.schema)]
        return [self._task(*piece, per_task_row_limit) for piece in self._pieces]

    def _task(self, file: InputFile, piece: RowRange, wanted: RowNumbers, row_limit: int | None) -> ReadTask:
        metadata = _metadata(len(wanted), piece.num_bytes, (file.path,))
        schema = block_of(self._schema.empty_table(), "", 0).schema
        read = partial(_read_blocks, file, piece.start, piece.stop, self._schema, wanted)
        return ReadTask(read, metadata, schema, row_limit)


def _metadata(num_rows: int, num_bytes: int, files: tuple[str, ...]) -> BlockMetadata:
    return BlockMetadata(
        num_rows=num_rows, size_bytes=num_bytes, exec_stats=None, task_exec_stats=None, input_files=files
    )


def _pieces(file: InputFile, wanted: RowNumbers) -> list[RowRange]:
    """The stretches of a file that hold rows which are wanted."""
    if not len(wanted):
        return []
    pieces = row_ranges(file, int(wanted[0]), int(wanted[-1]) + 1)
    return [piece for piece in pieces if len(rows_between(wanted, piece.start, piece.stop))]


def row_ranges(file: InputFile, first: int, end: int, task_bytes: int = TASK_BYTES) -> list[RowRange]:
    """Rows [first, end) of a file, cut at row groups into pieces of about `task_bytes` decompressed."""
    ranges: list[RowRange] = []
    start, stop, size = first, first, 0
    group_stop = 0
    for group_rows, group_bytes in zip(file.row_groups, file.row_group_bytes, strict=True):
        group_stop += group_rows
        if stop >= end:
            break
        if group_stop <= start:
            continue
        if stop > start and size + group_bytes > task_bytes:
            ranges.append(RowRange(start, stop, size))
            start, size = stop, 0
        stop, size = min(group_stop, end), size + group_bytes
    if start < stop:
        ranges.append(RowRange(start, stop, size))
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


def _read_blocks(file: InputFile, start: int, stop: int, columns: pa.Schema, wanted: RowNumbers) -> Iterator[pa.Table]:
    for batch in _batches(file, start, stop, columns):
        block = block_of(pa.Table.from_batches([batch]), file.src_path, start)
        if not isinstance(wanted, range):
            block = block.take(np.asarray(rows_between(wanted, start, start + batch.num_rows)) - start)
        yield block
        start += batch.num_rows


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
