"""Rows of Parquet files as blocks in which every row knows where it comes from.

A block has the columns `src_path` (string), `src_row` (int64, the row's number in its file, from 0) and `input`, a
struct of the input columns with their types unchanged. Knows nothing of prompts, nor of Ray.

A page that cannot be decoded is the fault of the file, a read that fails is the fault of the store: which of the two
raised an error tells them apart.
"""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from segue.pipeline.dataset.files import InputFile, RowNumbers, rows_between
from segue.pipeline.dataset.listing import is_local, stamp
from segue.pipeline.ledger.carried import converted
from segue.pipeline.processes.limited import clock_paused, tick
from segue.pipeline.storage.remote import open_remote

TASK_BYTES = 64 * 2**20
BLOCK_ROWS = 50_000
MANY_ROWS, FEW_ROWS = 4096, 64  # rows of a batch; few if many need too much memory
# Of a column, read at once, each a request to a store: a whole column chunk may be larger than memory.
LOCAL_READ_BYTES, REMOTE_READ_BYTES = 2**20, 2**24


class InputChanged(ValueError):
    """A file is not what it was when the job was checked."""


class InputUnreadable(OSError):
    """A file, or a page of it, cannot be read or decoded."""


class PageCorrupt(InputUnreadable):
    """A page was read and cannot be decoded, or is not what its checksum says."""


@dataclass(frozen=True, slots=True)
class RowRange:
    """Consecutive rows of a file, [start, stop). They begin with a row group or with the first row that is read."""

    start: int
    stop: int
    num_bytes: int  # decompressed, all columns


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
    return pa.Table.from_batches(read_batches(file, start, stop, columns), columns)


def read_batches(
    file: InputFile, start: int, stop: int, columns: pa.Schema, batch_rows: int = BLOCK_ROWS
) -> Iterator[pa.RecordBatch]:
    """Rows [start, stop) in batches of at most `batch_rows`, decoding only the row groups that hold them.

    Raises what `read_rows` does.
    """
    if not 0 <= start <= stop <= file.num_rows:
        raise ValueError(f"rows must lie within 0 to {file.num_rows} of {file.path}, got {start} to {stop}")
    left = stop - start
    if not left:
        return
    _check_unchanged(file)
    partition = dict(file.partition)
    names = [name for name in columns.names if name not in partition]
    with _opened(file.path) as parquet:
        for group, first in _groups_from(file, start):
            stop_of_group = first + file.row_groups[group]
            # One group a call: over several, Arrow cannot read dictionaries nested in structs.
            for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=names, use_threads=False):
                tick()
                rows = batch.slice(max(0, start - first), left)
                first += batch.num_rows
                if first > stop_of_group:
                    break
                left -= rows.num_rows
                if rows.num_rows:
                    yield _cast(rows, columns, partition)
                if not left:
                    return
            if first != stop_of_group:  # of a column there are fewer values than rows, or more
                wrong = f"row group {group} has not the {file.row_groups[group]:,} values of each column that it states"
                raise PageCorrupt(f"input.path: {file.path} cannot be read: {wrong}")


def block_of(table: pa.Table, src_path: str, first_row: int) -> pa.Table:
    """Consecutive rows of a file with their provenance; `first_row` is the number of the first."""
    rows = pa.arange(first_row, first_row + table.num_rows)
    paths = pa.repeat(pa.scalar(src_path, pa.string()), table.num_rows)
    structs = pa.chunked_array(table.to_struct_array(), pa.struct(list(table.schema)))
    return pa.table({"src_path": paths, "src_row": rows, "input": structs})


def read_blocks(
    file: InputFile, start: int, stop: int, columns: pa.Schema, wanted: RowNumbers, batch_rows: int = BLOCK_ROWS
) -> Iterator[tuple[int, pa.Table]]:
    """The rows [start, stop) that are wanted, in order, as pairs (number of the first row after the block, block).

    A block comes from at most `batch_rows` rows, and is empty if none of them is wanted. Raises what `read_rows` does.
    """
    for batch in read_batches(file, start, stop, columns, batch_rows):
        block = block_of(pa.Table.from_batches([batch]), file.src_path, start)
        if not isinstance(wanted, range):
            block = block.take(np.asarray(rows_between(wanted, start, start + batch.num_rows)) - start)
        start += batch.num_rows
        yield start, block


def gathered(blocks: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Blocks joined into pieces that are large enough for a block of Ray Data."""
    pieces: list[pa.Table] = []
    num_rows = num_bytes = 0
    for block in blocks:
        pieces.append(block)
        num_rows += block.num_rows
        num_bytes += block.nbytes
        if num_rows >= MANY_ROWS or num_bytes >= TASK_BYTES:
            yield pa.concat_tables(pieces)
            pieces, num_rows, num_bytes = [], 0, 0
    if pieces:
        yield pa.concat_tables(pieces)


def batch_rows_of(file: InputFile) -> int:
    """Rows of about 64 MiB. The footer says how large rows are, and may be wrong."""
    row_bytes = sum(file.row_group_bytes) // max(1, file.num_rows)
    return max(FEW_ROWS, min(MANY_ROWS, TASK_BYTES // max(1, row_bytes)))


def group_of(file: InputFile, row: int) -> int:
    """The number of the row group that has this row."""
    return next(_groups_from(file, row))[0]


def group_stop(file: InputFile, row: int) -> int:
    """The number of the first row after the row group that has this row."""
    group, first = next(_groups_from(file, row))
    return first + file.row_groups[group]


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    """Raises InputUnreadable, and PageCorrupt if no read failed; both also while the file is in use."""
    try:
        with clock_paused():
            stream = _Stream(*_open(path))
    except Exception as error:  # every store has errors of its own
        raise InputUnreadable(f"input.path: {path} cannot be read: {error}") from error
    size = LOCAL_READ_BYTES if is_local(path) else REMOTE_READ_BYTES
    with stream:
        try:
            with pq.ParquetFile(stream, page_checksum_verification=True, buffer_size=size) as parquet:
                yield parquet
        except (MemoryError, PageCorrupt):  # Arrow's own MemoryError is an ArrowException, too
            raise
        except Exception as error:
            if stream.failure is not None:
                raise InputUnreadable(f"input.path: {path} cannot be read: {stream.failure}") from error
            if isinstance(error, OSError | pa.ArrowException):
                raise PageCorrupt(f"input.path: {path} cannot be read: {error}") from error
            raise


def _open(path: str) -> tuple[Any, int]:
    """The file, unbuffered, and its size."""
    if is_local(path):
        file = io.FileIO(path)
        return file, os.fstat(file.fileno()).st_size
    fs, name = open_remote(path)
    file = fs.open(name, "rb", cache_type="none")
    return file, file.size


class _Stream(io.RawIOBase):
    """A file as Arrow reads it. Remembers the first read that failed; reads have time limits of their own."""

    def __init__(self, file: Any, size: int) -> None:
        self.failure: Exception | None = None
        self._file = file
        self._size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def size(self) -> int:
        return self._size

    def read(self, size: int = -1) -> bytes:
        try:
            with clock_paused():
                return self._file.read(size)
        except Exception as error:
            self.failure = self.failure or error
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _check_unchanged(file: InputFile) -> None:
    try:
        with clock_paused():
            now = stamp(file.path)
    except FileNotFoundError:
        raise InputChanged(f"{file.path} must be as it was planned, and it is gone") from None
    except Exception as error:  # every store has errors of its own
        raise InputUnreadable(f"input.path: {file.path} cannot be read: {error}") from error
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


def _cast(rows: pa.RecordBatch, columns: pa.Schema, partition: Mapping[str, pa.Scalar]) -> pa.RecordBatch:
    """The rows with the types that hold for all files; almost always they have them already."""
    if not columns.names:
        return rows.select([])
    names = columns.names
    arrays = [pa.repeat(partition[name], rows.num_rows) if name in partition else rows.column(name) for name in names]
    cast = [converted(array, field.type) for array, field in zip(arrays, columns, strict=True)]
    return pa.RecordBatch.from_arrays(cast, schema=columns)
