"""Which Parquet files a job reads: listed, opened by their footers, and identified.

Folders named `key=value` below the input root are columns of the files in them, as Hive and Spark write them: whole
numbers if all files' are, else texts. Knows nothing of prompts or of Ray.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from segue.pipeline.dataset.encryption import encrypted_columns
from segue.pipeline.dataset.listing import KEY, ListedFile, Listing, is_local, list_files
from segue.pipeline.problems import JobRefused, Problem, shown
from segue.pipeline.storage.remote import open_remote

MAX_FOOTER_BYTES = 64 * 2**20
MAX_COLUMNS, MAX_ROW_GROUPS = 10_000, 1_000_000
_TAIL_BYTES = 64 * 2**10  # most footers fit: one read a file
_FOOTER_THREADS = 8  # footers of remote files are latency, not work
MAX_PARTITION_KEYS = 100
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
RowNumbers = range | np.ndarray  # of rows of one file, ascending: an array, int64, where they are not consecutive


@dataclass(frozen=True, slots=True)
class InputFile:
    """One Parquet file of the input, as it was when it was found."""

    path: str  # absolute path or URL
    src_path: str  # below the common input root, with "/"; unique in a job
    size: int  # bytes
    version: str  # changes when the file does: mtime in ns, or the store's etag
    footer: str  # sha256 of the footer, which holds the schema and where every page lies
    num_rows: int
    row_groups: tuple[int, ...]  # rows of each
    row_group_bytes: tuple[int, ...]  # of each, decompressed, all columns
    schema: pa.Schema = field(compare=False, repr=False)  # without metadata, partition columns at the end
    partition: tuple[tuple[str, pa.Scalar], ...] = field(default=(), compare=False, repr=False)  # by column
    encrypted: frozenset[str] = field(default=frozenset(), compare=False, repr=False)  # columns

    @property
    def schema_sha(self) -> str:
        """Equal for files with the same column names and types in the same order."""
        return hashlib.sha256(self.schema.serialize()).hexdigest()

    def identity(self) -> dict[str, str | int]:
        """What a plan records of the file, and compares before it reads it again."""
        return {"src_path": self.src_path, "size": self.size, "version": self.version, "footer": self.footer}


def discover(paths: Sequence[str]) -> tuple[InputFile, ...]:
    """The files that `paths` name, in the order of `src_path`.

    A path is a file, a folder or a glob (`*`, `?`, `[..]`, `**`), local or of any fsspec file system. `src_path` is
    relative to the deepest folder above all of them. Raises JobRefused with one problem for each path that names
    nothing and for each file that is no readable Parquet file.
    """
    listings, problems = _list_all(paths)
    if not problems and len({is_local(listing.root) or listing.root.split("://")[0] for listing in listings}) > 1:
        problems.append(Problem(KEY, "paths of several file systems", "all input in one file system"))
    if problems:
        raise JobRefused(problems)
    root = os.path.commonpath([_bare(listing.root) for listing in listings])
    files = _distinct(file for listing in listings for file in listing.files)
    named = [(os.path.relpath(_bare(file.path), root), file) for file in files]
    return _open_all(sorted(named, key=lambda pair: pair[0]))


def rows_between(numbers: RowNumbers, start: int, stop: int) -> RowNumbers:
    """Of ascending numbers those in [start, stop)."""
    if isinstance(numbers, range):
        return range(max(numbers.start, start), min(numbers.stop, stop))
    return numbers[np.searchsorted(numbers, start) : np.searchsorted(numbers, stop)]


def cut_rows(rows: Sequence[RowNumbers], start: int, stop: int | None) -> tuple[RowNumbers, ...]:
    """Of rows of several files those that come as number `start` up to, but without, `stop`, in the files' order."""
    cut: list[RowNumbers] = []
    first = 0
    for numbers in rows:
        end = None if stop is None else max(0, stop - first)
        cut.append(numbers[max(0, start - first) : end])
        first += len(numbers)
    return tuple(cut)


def _list_all(paths: Sequence[str]) -> tuple[list[Listing], list[Problem]]:
    listings: list[Listing] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            listings.append(list_files(path))
        except JobRefused as refused:
            problems += refused.problems
    return listings, problems


def _bare(path: str) -> str:
    """A path or URL as an absolute path in its file system."""
    return path if is_local(path) else "/" + path.split("://", 1)[1].strip("/")


def _distinct(files: Iterable[ListedFile]) -> list[ListedFile]:
    """Each file once: under its own name if it was listed by that, else under the first link to it."""
    by_target: dict[str, ListedFile] = {}
    for file in sorted(files, key=lambda file: file.path):
        target = os.path.realpath(file.path) if is_local(file.path) else file.path
        if target not in by_target or file.path == target:
            by_target[target] = file
    return list(by_target.values())


def _open_all(named: Sequence[tuple[str, ListedFile]]) -> tuple[InputFile, ...]:
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        opened = list(pool.map(lambda pair: _open(*pair), named))
    problems = [each for each in opened if isinstance(each, Problem)]
    if problems:
        raise JobRefused(problems)
    files = _partitioned([each for each in opened if isinstance(each, InputFile)])
    schemas: dict[str, pa.Schema] = {}  # thousands of files mostly share one schema: keep one copy
    return tuple(replace(file, schema=schemas.setdefault(file.schema_sha, file.schema)) for file in files)


def _partitioned(files: Sequence[InputFile]) -> list[InputFile]:
    """The files with the columns that their folders give them, null where a file has no such folder; a column that a
    file has itself stays as it is there. Raises JobRefused for more keys than anybody has."""
    found = [_folder_values(file.src_path) for file in files]
    partitioned = list(files)
    keys = list(dict.fromkeys(key for values in found for key in values))
    if len(keys) > MAX_PARTITION_KEYS:
        got = f"folders key=value with {len(keys):,} keys"
        raise JobRefused([Problem(KEY, got, f"at most {MAX_PARTITION_KEYS}")])
    for key in keys:
        values = [each.get(key) for each in found]
        kind = pa.int64() if all(value is None or _is_whole(value) for value in values) else pa.string()
        for index, (file, value) in enumerate(zip(partitioned, values, strict=True)):
            if key not in file.schema.names:
                scalar = pa.scalar(int(value) if value is not None and kind == pa.int64() else value, kind)
                schema = file.schema.append(pa.field(key, kind))
                partitioned[index] = replace(file, schema=schema, partition=(*file.partition, (key, scalar)))
    return partitioned


def _folder_values(src_path: str) -> dict[str, str | None]:
    """Of the folders key=value in a path, in order."""
    parts = (part.partition("=") for part in src_path.split("/")[:-1])
    told = {unquote(key): unquote(value) for key, equals, value in parts if key and equals}
    return {key: None if value == HIVE_NULL else value for key, value in told.items()}


def _is_whole(value: str) -> bool:
    return re.fullmatch(r"0|-?[1-9][0-9]{0,17}", value) is not None


def _open(src_path: str, listed: ListedFile) -> InputFile | Problem:
    """Read a file's footer; anything wrong with it is a problem that names the file."""
    try:
        footer = _footer_of(listed)
        parquet = pq.ParquetFile(pa.BufferReader(footer))
        metadata, schema = parquet.metadata, parquet.schema_arrow.remove_metadata()
    # Arrow's own kinds: ArrowInvalid is a ValueError, ArrowNotImplementedError (an unknown type or codec) the third.
    except (OSError, ValueError, NotImplementedError) as error:
        return Problem(KEY, f"{shown(listed.path)} ({error})", "a readable Parquet file")
    if metadata.num_columns > MAX_COLUMNS or metadata.num_row_groups > MAX_ROW_GROUPS:
        got = f"{shown(listed.path)} with {metadata.num_columns:,} columns and {metadata.num_row_groups:,} row groups"
        return Problem(KEY, got, f"at most {MAX_COLUMNS:,} columns and {MAX_ROW_GROUPS:,} row groups in a file")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    counts = [group.num_rows for group in groups]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
        got = f"{shown(listed.path)} with {metadata.num_rows:,} rows, and {sum(counts):,} in its row groups"
        return Problem(KEY, got, "a footer that agrees with itself")
    return InputFile(
        path=listed.path,
        src_path=src_path,
        size=listed.size,
        version=listed.version,
        footer=hashlib.sha256(footer).hexdigest(),
        num_rows=metadata.num_rows,
        row_groups=tuple(group.num_rows for group in groups),
        row_group_bytes=tuple(group.total_byte_size for group in groups),
        schema=schema,
        encrypted=encrypted_columns(footer, metadata, schema),
    )


def _footer_of(listed: ListedFile) -> bytes:
    """The footer with its length and magic. Raises ValueError for what is not a whole Parquet file."""
    if listed.size < 12:
        raise ValueError(f"{listed.size} bytes, not a Parquet file")
    fs, name = open_remote(listed.path)
    tail = fs.cat_file(name, start=max(0, listed.size - _TAIL_BYTES), end=listed.size)
    if tail[-4:] == b"PARE":
        raise ValueError("encrypted")
    if tail[-4:] != b"PAR1":
        raise ValueError("truncated or not a Parquet file: it does not end in PAR1")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > min(listed.size - 4, MAX_FOOTER_BYTES):
        raise ValueError(f"a footer of {length:,} bytes in a file of {listed.size:,}")
    return tail[-length:] if length <= len(tail) else fs.cat_file(name, start=listed.size - length, end=listed.size)
