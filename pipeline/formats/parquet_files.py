"""A folder of new Parquet files: complete, or not at all. Knows tables; not where they come from."""

import io
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from segue.pipeline.problems import JobRefused, Problem, shown
from segue.pipeline.storage.store import OutputStorageError

GROUP_ROWS, GROUP_BYTES = 65_536, 64 * 2**20


class ParquetFiles:
    """Files of `rows_per_file` rows, the last one with the rest. As a context manager it leaves nothing after an error.

    Until `close` the files have names that no reader takes for data. Every method raises OutputStorageError.
    """

    def __init__(self, folder: Path, schema: pa.Schema, rows_per_file: int) -> None:
        """Raises JobRefused if Parquet cannot store a type of the schema."""
        _check_storable(schema)
        self.num_added = 0  # rows
        self._folder, self._schema, self._rows_per_file = folder, schema, rows_per_file
        self._parts: list[Path] = []
        self._writer: pq.ParquetWriter | None = None
        self._file_rows = 0  # in the file that is open
        self._group: list[pa.Table] = []

    def __enter__(self) -> "ParquetFiles":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._discard()

    @property
    def num_files(self) -> int:
        return len(self._parts)

    def add(self, table: pa.Table) -> None:
        """Append the rows of a table."""
        while table.num_rows:
            piece = table.slice(0, self._rows_per_file - self._file_rows)
            table = table.slice(piece.num_rows)
            self._group.append(piece)
            self._file_rows += piece.num_rows
            self.num_added += piece.num_rows
            is_full = self._file_rows == self._rows_per_file
            if is_full or _is_large(self._group):
                self._write(is_last=is_full)

    def close(self) -> None:
        """Write what is left and give the files their names. Without any row there is one file of none."""
        if self._group or self._writer or not self._parts:
            self._write(is_last=True)
        try:
            for part in self._parts:
                part.rename(part.with_name(part.name[1:]))
        except OSError as error:
            raise self._unwritten(error) from error

    def stored_schema(self) -> pa.Schema:
        """The columns as readers will find them: Parquet has no timestamps in seconds. After `close`."""
        return pq.read_schema(self._parts[0].with_name(self._parts[0].name[1:]))

    def _write(self, *, is_last: bool) -> None:
        """Write what is held as a row group."""
        try:
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._parts.append(self._folder / f".part-{len(self._parts):06d}.parquet")
                self._writer = pq.ParquetWriter(self._parts[-1], self._schema, compression="zstd")
            if self._group:
                self._writer.write_table(pa.concat_tables(self._group), row_group_size=GROUP_ROWS)
            self._group = []
            if is_last:
                self._writer.close()
                self._writer, self._file_rows = None, 0
        except OSError as error:
            raise self._unwritten(error) from error

    def _discard(self) -> None:
        with suppress(OSError):
            if self._writer is not None:
                self._writer.close()
        for part in self._parts:
            part.unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()

    def _unwritten(self, error: OSError) -> OutputStorageError:
        return OutputStorageError(f"{self._folder} cannot be written: {error}")


def check_new_folder(folder: Path) -> None:
    """Raises JobRefused if there is something in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise JobRefused([Problem("TARGET", shown(str(folder)), "a new folder, or an empty one")])


def _is_large(tables: Iterable[pa.Table]) -> bool:
    return sum(each.num_rows for each in tables) >= GROUP_ROWS or sum(each.nbytes for each in tables) >= GROUP_BYTES


def _check_storable(schema: pa.Schema) -> None:
    for field in schema:
        try:
            pq.write_table(pa.schema([field]).empty_table(), io.BytesIO())
        except pa.ArrowException:
            got = f"column {shown(field.name)} of type {str(field.type)[:200]}"
            raise JobRefused([Problem("SOURCE", got, "types that Parquet can store")]) from None
