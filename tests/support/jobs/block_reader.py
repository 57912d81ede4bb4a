"""A reader of rows for the read tasks of `RowSource`."""

from collections.abc import Iterator

import pyarrow as pa

from segue.pipeline.dataset.blocks import block_of, read_blocks
from segue.pipeline.dataset.files import InputFile, RowNumbers


class Blocks:
    """The reader of a source whose blocks are those of `pipeline/dataset/blocks.py`."""

    def __init__(self, columns: pa.Schema) -> None:
        self._columns = columns

    def read(self, file: InputFile, start: int, stop: int, wanted: RowNumbers) -> Iterator[pa.Table]:
        return (block for _, block in read_blocks(file, start, stop, self._columns, wanted))

    def empty(self) -> pa.Table:
        return block_of(self._columns.empty_table(), "", 0)
