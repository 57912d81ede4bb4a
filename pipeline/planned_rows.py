"""Rows of files as rows of the plan: made in a child process, so that a hostile one costs itself.

Rows go many at a time. Where that ends the child, they go one by one, and a row that ends it alone is convicted. Behind
a page that cannot be read, because it is corrupt or too large, nothing more of a row group can be: its rows up to there
are planned and the others are errors. Knows rows and limits; which rows there are is for the caller.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from pipeline.limited import ChildDied, Death, LimitedProcess
from pipeline.render import RenderSpec, encoder_of, planned_schema, render_block, unplanned
from pipeline.rows import BLOCK_ROWS, TASK_BYTES, PageCorrupt, group_stop, read_blocks
from pipeline.sources import InputFile, RowNumbers, rows_between
from workers.row_errors import RowError, RowErrorCode

MANY_ROWS, FEW_ROWS = 4096, 64  # a batch; the second where the first needed too much memory
MAX_CONVICTED_IN_A_ROW = 50  # then it is not the rows


class PreparationFailed(RuntimeError):
    """Every row ends the process that prepares it: the template, the tokenizer or the limits are to blame."""


@dataclass(frozen=True, slots=True)
class RowLimits:
    """What one row may take until it is planned (`limits` of a job)."""

    seconds: float
    memory_bytes: int  # beyond what the process needs for itself

    def error(self, death: Death) -> RowError:
        """Of a row that ended its process when it was alone in it."""
        took = "reading, rendering and tokenising this row alone took more than"
        if death == "time":
            return RowError(RowErrorCode.ROW_TIMEOUT, f"{took} limits.row_cpu_s, {self.seconds:g} s of CPU time")
        if death == "memory":
            return RowError(RowErrorCode.ROW_OOM, f"{took} limits.row_memory_bytes, {self.memory_bytes:,}")
        message = "reading, rendering and tokenising this row alone ended its process"
        return RowError(RowErrorCode.WORKER_CRASH, message)


class PlannedRowReader:
    """Blocks of the plan's own columns and those passed through (`pipeline.render.planned_schema`)."""

    def __init__(self, columns: pa.Schema, spec: RenderSpec, limits: RowLimits) -> None:
        """`columns`: what is read, with the types that hold in all files."""
        self._columns = columns
        self._spec = spec
        self._limits = limits

    def empty(self) -> pa.Table:
        return planned_schema(self._columns, self._spec).empty_table()

    def read(self, file: InputFile, start: int, stop: int, wanted: RowNumbers) -> Iterator[pa.Table]:
        """Raises InputChanged, InputUnreadable, PreparationFailed."""
        child = _child_for(self._spec, self._limits)
        return _gathered(_Range(self._columns, self._spec, self._limits, child, file, stop, wanted).blocks(start))


class _Range:
    """The rows of one call up to `stop`."""

    def __init__(
        self,
        columns: pa.Schema,
        spec: RenderSpec,
        limits: RowLimits,
        child: LimitedProcess,
        file: InputFile,
        stop: int,
        wanted: RowNumbers,
    ) -> None:
        self._columns, self._spec, self._limits, self._child = columns, spec, limits, child
        self._file, self._stop, self._wanted = file, stop, wanted
        self._last_convicted = -1
        self._in_a_row = 0

    def blocks(self, position: int) -> Iterator[pa.Table]:
        alone_until = position  # rows before this one go one by one
        thrifty_until = position  # and before this one few at a time
        while position < self._stop:
            size, end = _batch_rows(self._file), self._stop
            if position < alone_until:
                size, end = 1, alone_until
            elif position < thrifty_until:
                size, end = min(size, FEW_ROWS), thrifty_until
            request = (self._file, position, end, self._columns, self._wanted, self._spec, size)
            is_read = False
            try:
                for after, block in self._child.stream(_planned_blocks, *request):
                    is_read = block is None
                    if block is not None:
                        yield block
                        position = after
            except (ChildDied, PageCorrupt) as failure:
                behind = min(self._stop, group_stop(self._file, position))
                if size > FEW_ROWS and isinstance(failure, ChildDied) and failure.death == "memory":
                    thrifty_until = behind
                elif size > 1:
                    alone_until = min(self._stop, position + size)
                elif is_read:
                    yield self._convicted(position, position + 1, self._error(failure))
                    position += 1
                    self._count(position)
                else:
                    yield from self._lost(position, behind, self._error(failure))
                    position = behind

    def _error(self, failure: ChildDied | PageCorrupt) -> RowError:
        if isinstance(failure, ChildDied):
            return self._limits.error(failure.death)
        return RowError(RowErrorCode.INPUT_CORRUPT, f"a page of the row's row group cannot be decoded: {failure}")

    def _convicted(self, start: int, stop: int, error: RowError) -> pa.Table:
        """Rows [start, stop), as far as they are wanted, with an error instead of a prompt."""
        numbers = rows_between(self._wanted, start, stop)
        return unplanned(self._file.src_path, numbers, error, self._columns, self._spec)

    def _lost(self, start: int, stop: int, error: RowError) -> Iterator[pa.Table]:
        """The same for many: what is behind a page that cannot be read cannot be reached."""
        for first in range(start, stop, BLOCK_ROWS):
            yield self._convicted(first, min(stop, first + BLOCK_ROWS), error)

    def _count(self, convicted: int) -> None:
        self._in_a_row = self._in_a_row + 1 if convicted == self._last_convicted + 1 else 1
        self._last_convicted = convicted
        if self._in_a_row > MAX_CONVICTED_IN_A_ROW:
            raise PreparationFailed(
                f"{self._in_a_row} rows one after the other ended the process that reads, renders and tokenises "
                f"them, up to row {convicted - 1:,} of {self._file.src_path}: is it the chat template, or are "
                "limits.row_cpu_s and limits.row_memory_bytes too low?"
            )


def _batch_rows(file: InputFile) -> int:
    """Of ordinary rows, some 64 MiB at a time; the footer says how large they are, and may lie."""
    row_bytes = sum(file.row_group_bytes) // max(1, file.num_rows)
    return max(FEW_ROWS, min(MANY_ROWS, TASK_BYTES // max(1, row_bytes)))


def _planned_blocks(
    file: InputFile,
    start: int,
    stop: int,
    columns: pa.Schema,
    wanted: RowNumbers,
    spec: RenderSpec,
    batch_rows: int,
) -> Iterator[tuple[int, pa.Table | None]]:
    """In the child. (number of the next row, block); before the block of a single row, that it was read: (.., None)."""
    for position, block in read_blocks(file, start, stop, columns, wanted, batch_rows):
        if batch_rows == 1:
            yield position, None
        yield position, render_block(block, spec)


def _gathered(blocks: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """In pieces that are worth a block of Ray's."""
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


_kept: list[tuple[RenderSpec, RowLimits, LimitedProcess]] = []  # at most one


def _child_for(spec: RenderSpec, limits: RowLimits) -> LimitedProcess:
    """Kept between tasks: Ray runs many in one process, and a tokenizer takes a second to load."""
    if not _kept or _kept[0][:2] != (spec, limits):
        for *_, child in _kept:
            child.close()
        _kept[:] = [(spec, limits, LimitedProcess(limits.seconds, limits.memory_bytes, partial(encoder_of, spec)))]
    return _kept[0][2]
