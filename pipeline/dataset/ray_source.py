"""A dataset's rows as a Ray Data source.

`ray.data.read_parquet` has no row numbers, so read tasks here are pieces of files, consecutive row groups, planned from
footers alone. A task has one large piece or several small ones, of as many files. A reader makes the blocks: for the
plan it is `pipeline/prompts/rows.py`.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import pyarrow as pa
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import ReadTask

from segue.pipeline.dataset.blocks import TASK_BYTES, RowRange, gathered, row_ranges
from segue.pipeline.dataset.files import InputFile, RowNumbers, rows_between

TASK_PIECES = 64  # at most: a task costs Ray a tenth of a second, and opening a file of a bucket as much
Piece = tuple[InputFile, RowRange, RowNumbers]  # what is read by itself, and which of its rows are wanted


class BlockReader(Protocol):
    """What a read task does. Is pickled into it."""

    def read(self, file: InputFile, start: int, stop: int, wanted: RowNumbers) -> Iterator[pa.Table]:
        """Blocks of those of the rows [start, stop) that are wanted."""
        ...

    def empty(self) -> pa.Table:
        """A block of no rows."""
        ...


class RowSource(Datasource):
    """Rows of `files`, each once, in (src_path, src_row) order.

    The rows and their provenance depend on the files alone, not on row groups, parallelism or blocks. Ray does not keep
    the order of blocks unless told to.
    """

    pieces: list[Piece]

    def __init__(
        self, files: Sequence[InputFile], reader: BlockReader, rows: Sequence[RowNumbers] | None = None
    ) -> None:
        """`rows`: of each file the numbers of those to read; all of them if it is left out."""
        super().__init__()
        self._reader = reader
        self.pieces = [
            (file, piece, rows_between(wanted, piece.start, piece.stop))
            for file, wanted in zip(files, rows or [range(file.num_rows) for file in files], strict=True)
            for piece in _pieces(file, wanted)
        ]

    @property
    def num_rows(self) -> int:
        return sum(len(wanted) for *_, wanted in self.pieces)

    def estimate_inmemory_data_size(self) -> int:
        return sum(piece.num_bytes for _, piece, _ in self.pieces)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """The same tasks whatever `parallelism` says; for no rows, one task that gives an empty block."""
        empty = self._reader.empty()
        if not self.pieces:
            return [ReadTask(lambda: [empty], _metadata(0, 0, ()), empty.schema)]
        return [
            ReadTask(
                partial(_blocks, self._reader, pieces),
                _metadata(
                    sum(len(wanted) for *_, wanted in pieces),
                    sum(piece.num_bytes for _, piece, _ in pieces),
                    tuple(dict.fromkeys(file.path for file, *_ in pieces)),
                ),
                empty.schema,
                per_task_row_limit,
            )
            for pieces in _tasks(self.pieces)
        ]


def _blocks(reader: BlockReader, pieces: Sequence[Piece]) -> Iterator[pa.Table]:
    return gathered(block for file, piece, own in pieces for block in reader.read(file, piece.start, piece.stop, own))


def _tasks(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Consecutive pieces of about TASK_BYTES together."""
    tasks: list[list[Piece]] = []
    size = 0
    for each in pieces:
        size += each[1].num_bytes
        if not tasks or size > TASK_BYTES or len(tasks[-1]) == TASK_PIECES:
            tasks.append([])
            size = each[1].num_bytes
        tasks[-1].append(each)
    return tasks


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
