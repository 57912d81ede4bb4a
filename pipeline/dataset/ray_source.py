"""A dataset's rows as a Ray Data source.

`ray.data.read_parquet` has no row numbers, so read tasks here are (file, consecutive row groups), planned from footers
alone. What a block is made of is its reader's: rows as they are here, rows of the plan in `pipeline/prompts/rows.py`.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import pyarrow as pa
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import ReadTask

from segue.pipeline.dataset.blocks import RowRange, block_of, read_blocks, row_ranges
from segue.pipeline.dataset.files import InputFile, RowNumbers, rows_between


class BlockReader(Protocol):
    """What a read task does. Is pickled into it."""

    def read(self, file: InputFile, start: int, stop: int, wanted: RowNumbers) -> Iterator[pa.Table]:
        """Blocks of those of the rows [start, stop) that are wanted."""
        ...

    def empty(self) -> pa.Table:
        """A block of no rows."""
        ...


class RowReader:
    """Blocks of `pipeline/dataset/blocks.py`, of the columns that it is given with the types they have in all files."""

    def __init__(self, columns: pa.Schema) -> None:
        self._columns = columns

    def read(self, file: InputFile, start: int, stop: int, wanted: RowNumbers) -> Iterator[pa.Table]:
        """Raises InputChanged, InputUnreadable."""
        for _, block in read_blocks(file, start, stop, self._columns, wanted):
            yield block

    def empty(self) -> pa.Table:
        return block_of(self._columns.empty_table(), "", 0)


class RowSource(Datasource):
    """Rows of `files`, each once, in (src_path, src_row) order.

    The rows and their provenance depend on the files alone, not on row groups, parallelism or blocks. Ray keeps
    no order of blocks unless told to.
    """

    def __init__(
        self, files: Sequence[InputFile], reader: BlockReader, rows: Sequence[RowNumbers] | None = None
    ) -> None:
        """`rows`: of each file the numbers of those to read; all of them if it is left out."""
        super().__init__()
        self._reader = reader
        self._pieces = [
            (file, piece, rows_between(wanted, piece.start, piece.stop))
            for file, wanted in zip(files, rows or [range(file.num_rows) for file in files], strict=True)
            for piece in _pieces(file, wanted)
        ]

    @property
    def num_rows(self) -> int:
        return sum(len(wanted) for *_, wanted in self._pieces)

    @property
    def num_pieces(self) -> int:
        """Stretches of files that are read by themselves."""
        return len(self._pieces)

    def empty(self) -> pa.Table:
        return self._reader.empty()

    def blocks(self) -> Iterator[pa.Table]:
        """All rows, read by this process."""
        for file, piece, wanted in self._pieces:
            yield from self._reader.read(file, piece.start, piece.stop, wanted)

    def estimate_inmemory_data_size(self) -> int:
        return sum(piece.num_bytes for _, piece, _ in self._pieces)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task a range, whatever parallelism is asked for; for no rows, one that gives an empty block."""
        empty = self._reader.empty()
        if not self._pieces:
            return [ReadTask(lambda: [empty], _metadata(0, 0, ()), empty.schema)]
        return [
            ReadTask(
                partial(self._reader.read, file, piece.start, piece.stop, wanted),
                _metadata(len(wanted), piece.num_bytes, (file.path,)),
                empty.schema,
                per_task_row_limit,
            )
            for file, piece, wanted in self._pieces
        ]


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
