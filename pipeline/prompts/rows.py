"""Rows of files as rows of the plan, made in a child process, so that a hostile row costs only itself.

Many rows are made at a time. If that ends the child, they are made one by one, and a row that ends it alone is
convicted. After a page that cannot be read, because it is corrupt or too large, nothing more of its row group can be
read: the rows before it are planned, the rows after it become errors. Knows rows and limits; not which rows to make.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from segue.pipeline.dataset.blocks import (
    BLOCK_ROWS,
    FEW_ROWS,
    PageCorrupt,
    batch_rows_of,
    group_stop,
    read_blocks,
)
from segue.pipeline.dataset.files import InputFile, RowNumbers, rows_between
from segue.pipeline.processes.limited import ChildDied, Death, LimitedProcess
from segue.pipeline.prompts.render import RenderSpec, encoder_of, planned_schema, render_block, unplanned
from segue.workers.errors import RowError, RowErrorCode

MAX_CONVICTED_IN_A_ROW = 50  # after that the rows are not to blame
MAX_CONVICTED = 1000  # of one task, since each may take limits.row_cpu_s several times
DEATHS = 2  # of processes in which a row was alone, until the row is convicted
CRASHES = 3  # the same for processes that died without a known reason
CRASH_PAUSE_SECONDS = 2.0


class PreparationFailed(RuntimeError):
    """Too many rows end the process that prepares them: the template, the tokenizer or the limits are to blame."""


@dataclass(frozen=True, slots=True)
class RowLimits:
    """What it may take to plan one row (`limits` of a job)."""

    seconds: float
    memory_bytes: int  # beyond what the process needs for itself

    def error(self, death: Death) -> RowError:
        """The error of a row that ended its process when it was alone in it."""
        took = "reading, rendering and tokenising this row alone took more than"
        if death == "time":
            return RowError(RowErrorCode.ROW_TIMEOUT, f"{took} limits.row_cpu_s, {self.seconds:g} s of CPU time")
        if death == "memory":
            return RowError(RowErrorCode.ROW_OOM, f"{took} limits.row_memory_bytes, {self.memory_bytes:,}")
        message = "reading, rendering and tokenising this row alone ended its process"
        return RowError(RowErrorCode.WORKER_CRASH, message)


class PlannedRowReader:
    """Blocks of the plan's own columns and those passed through (`segue.pipeline.prompts.render.planned_schema`)."""

    def __init__(self, columns: pa.Schema, spec: RenderSpec, limits: RowLimits) -> None:
        """`columns` are those that are read, with one type for all files."""
        self._columns = columns
        self._spec = spec
        self._limits = limits

    def empty(self) -> pa.Table:
        return planned_schema(self._columns, self._spec).empty_table()

    def settle(self, child: LimitedProcess) -> None:
        """Make a child ready for `read` that did other work before. Raises what loading the tokenizer raises."""
        child.settle(self._limits.seconds, self._limits.memory_bytes, partial(encoder_of, self._spec))

    def read(
        self, file: InputFile, start: int, stop: int, wanted: RowNumbers, child: LimitedProcess | None = None
    ) -> Iterator[pa.Table]:
        """Rows are made in `child`, or in one that this process keeps: Ray runs many tasks in one process.

        Raises InputChanged, InputUnreadable, PreparationFailed.
        """
        child = child or _child_for(self._spec, self._limits)
        return _Range(self._columns, self._spec, self._limits, child, file, stop, wanted).blocks(start)


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
        self._position = 0  # number of the next row
        self._is_read = False  # whether that row had been read when its process died
        self._deaths = 0  # of processes in which that row was alone
        self._convictions = self._in_a_row = 0

    def blocks(self, position: int) -> Iterator[pa.Table]:
        thrifty_until = alone_until = single_until = self._position = position  # each _Way holds up to this row
        while self._position < self._stop:
            way = _Way(batch_rows_of(self._file), self._stop)
            if self._position < single_until:
                way = _Way(1, single_until, is_alone=True)
            elif self._position < alone_until:
                way = _Way(FEW_ROWS, alone_until, is_alone=True)
            elif self._position < thrifty_until:
                way = _Way(FEW_ROWS, thrifty_until)
            try:
                yield from self._planned(way)
                continue
            except (ChildDied, PageCorrupt) as failed:
                failure = failed
            behind = min(self._stop, group_stop(self._file, self._position))
            if not way.is_alone and way.rows > FEW_ROWS and _is_of_memory(failure):
                thrifty_until = behind
            elif not way.is_alone:
                alone_until = min(self._stop, self._position + way.rows)
            elif not self._is_read and way.rows > 1:
                single_until = min(alone_until, self._position + way.rows)
            elif self._is_proven(failure):
                yield from self._given_up(failure, self._position + 1 if self._is_read else behind)

    def _planned(self, way: "_Way") -> Iterator[pa.Table]:
        """The blocks that come before the child fails. Raises ChildDied, PageCorrupt."""
        self._is_read = False
        request = (self._file, self._position, way.stop, self._columns, self._wanted, self._spec)
        for after, block in self._child.stream(_planned_blocks, *request, way.rows, way.is_alone):
            if block is not None:
                yield block
                self._in_a_row = 0 if block.num_rows else self._in_a_row
            self._is_read = block is None
            self._deaths = self._deaths if after == self._position else 0
            self._position = after

    def _is_proven(self, failure: ChildDied | PageCorrupt) -> bool:
        """Whether the next row has ended enough processes. One death proves nothing: memory may have been short, or a
        byte may have flipped on the way. Before a crash is tried again there is a pause, since kills from outside come
        several at a time."""
        self._deaths += 1
        is_crash = isinstance(failure, ChildDied) and failure.death == "crash"
        if is_crash and self._deaths < CRASHES:
            time.sleep(CRASH_PAUSE_SECONDS)
        return self._deaths >= (CRASHES if is_crash else DEATHS)

    def _given_up(self, failure: ChildDied | PageCorrupt, stop: int) -> Iterator[pa.Table]:
        """The wanted rows from the next one up to `stop`, with an error instead of a prompt: rows after a page that
        cannot be read are out of reach."""
        error = self._error(failure)
        if isinstance(failure, ChildDied):
            self._count()
        for first in range(self._position, stop, BLOCK_ROWS):
            numbers = rows_between(self._wanted, first, min(stop, first + BLOCK_ROWS))
            yield unplanned(self._file.src_path, numbers, error, self._columns, self._spec)
        self._position, self._deaths = stop, 0

    def _error(self, failure: ChildDied | PageCorrupt) -> RowError:
        if isinstance(failure, ChildDied):
            return self._limits.error(failure.death)
        return RowError(RowErrorCode.INPUT_CORRUPT, f"a page of the row's row group cannot be decoded: {failure}")

    def _count(self) -> None:
        self._convictions += 1
        self._in_a_row += 1
        if self._in_a_row > MAX_CONVICTED_IN_A_ROW or self._convictions > MAX_CONVICTED:
            raise PreparationFailed(
                f"{self._convictions} rows of {self._file.src_path}, {self._in_a_row} of them one after the other, "
                f"ended the process that reads, renders and tokenises them, the last one row {self._position:,}: is "
                "it the chat template, or are limits.row_cpu_s and limits.row_memory_bytes too low?"
            )


@dataclass(frozen=True, slots=True)
class _Way:
    """How rows are made. From the quickest way to the safest: many at a time; few at a time, if many need too much
    memory; few read at a time and each rendered alone; each read alone, too. The last way decodes for each row all
    rows before it in its row group."""

    rows: int  # that are read at once
    stop: int
    is_alone: bool = False


def _is_of_memory(failure: ChildDied | PageCorrupt) -> bool:
    return isinstance(failure, ChildDied) and failure.death == "memory"


def _planned_blocks(
    file: InputFile,
    start: int,
    stop: int,
    columns: pa.Schema,
    wanted: RowNumbers,
    spec: RenderSpec,
    batch_rows: int,
    is_alone: bool,
) -> Iterator[tuple[int, pa.Table | None]]:
    """Runs in the child. Yields (number of the next row, block). If rows are alone, it yields (number of the row, None)
    once the row is read, then its block of one row, and at the end an empty block."""
    for after, block in read_blocks(file, start, stop, columns, wanted, batch_rows):
        if is_alone:
            for index, number in enumerate(block["src_row"].to_pylist()):
                yield number, None
                yield number + 1, render_block(block.slice(index, 1), spec)
        yield after, render_block(block.slice(0, 0) if is_alone else block, spec)


_kept: list[tuple[RenderSpec, RowLimits, LimitedProcess]] = []  # at most one


def _child_for(spec: RenderSpec, limits: RowLimits) -> LimitedProcess:
    """Kept between tasks: Ray runs many in one process, and a tokenizer takes a second to load."""
    if not _kept or _kept[0][:2] != (spec, limits):
        for *_, child in _kept:
            child.close()
        child = LimitedProcess(limits.seconds, limits.memory_bytes, partial(encoder_of, spec))
        _kept[:] = [(spec, limits, child)]
    return _kept[0][2]
