"""Data in other formats to a Parquet dataset, and an output folder to other formats: complete, or not at all.

A line that cannot be read ends the conversion and is named by file and number: nobody would notice rows that are
missing. Reads through Arrow, and Hugging Face datasets through their own library. Knows no model and no job.
"""

import base64
import csv
import datetime
import decimal
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv as arrow_csv
from pyarrow import json as arrow_json

from segue.pipeline.dataset.listing import has_magic, is_hidden
from segue.pipeline.ledger.reading import read_columns
from segue.pipeline.problems import JobRefused, Problem, shown
from segue.pipeline.storage.store import OutputStorageError

HUB = "hf:"  # begins the name of a dataset on Hugging Face's hub: hf:NAME, hf:NAME:SPLIT
READ_BYTES = 16 * 2**20  # of JSON and CSV that are read at once; a line of JSON must fit
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SAVED_DATASET = ("dataset_info.json", "state.json", "dataset_dict.json")  # files that datasets.save_to_disk writes

_QUOTED_ROW, _QUOTED_VALUE = re.compile(r"(got \d+): .*"), re.compile(r"invalid value '.*")


@dataclass(frozen=True, slots=True)
class Converted:
    """The result of a conversion."""

    path: str
    num_rows: int
    num_files: int
    columns: tuple[str, ...]


def to_parquet(source: str, folder: str, rows_per_file: int) -> Converted:
    """Write a dataset of Parquet files into `folder`, which must be new or empty.

    `source` is a file, folder or glob of JSON lines, or of CSV (comma) or TSV whose first line has the names; or a
    folder that `datasets.save_to_disk` wrote; or `hf:NAME[:SPLIT]`, a dataset on Hugging Face's hub. Raises JobRefused,
    and OutputStorageError if the folder cannot be written.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise JobRefused([Problem("TARGET", shown(folder), "a new folder, or an empty one")])
    written: list[Path] = []
    num_rows, schema = 0, pa.schema([])
    try:
        for table in _pieces(_batches(source), rows_per_file):
            written.append(target / f".part-{len(written):06d}.parquet")
            _write(table, written[-1], min(rows_per_file, 65_536))
            num_rows, schema = num_rows + table.num_rows, table.schema
    except BaseException:
        for part in written:
            part.unlink(missing_ok=True)
        with suppress(OSError):
            target.rmdir()
        raise
    for part in written:  # only now do the files get names that readers take for data
        part.rename(part.with_name(part.name[1:]))
    return Converted(folder, num_rows, len(written), tuple(schema.names))


def _write(table: pa.Table, part: Path, group_rows: int) -> None:
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, part, compression="zstd", row_group_size=group_rows)
    except OSError as error:
        raise OutputStorageError(f"{part.parent} cannot be written: {error}") from error


def from_output(output: str, path: str) -> Converted:
    """Write every committed row of an output folder, in plan order, as CSV if `path` ends in .csv, else as JSON lines.

    In CSV, lists and structs are JSON. Times are ISO 8601, decimals are text, bytes are base64, NaN is null. Raises
    ForeignOutput, OutputStorageError, and JobRefused if `path` cannot be written.
    """
    part = f"{path}.part"
    try:
        with open(part, "w", encoding="utf-8", newline="") as file:
            num_rows, names = _write_rows(file, output, is_csv=path.endswith(".csv"))
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(part)
        if isinstance(error, OutputStorageError):  # the output could not be read
            raise
        raise JobRefused(
            [Problem("TARGET", f"{shown(path)} ({error.strerror})", "a file that can be written")]
        ) from None
    return Converted(path, num_rows, 1, names)


def _write_rows(file: TextIO, output: str, *, is_csv: bool) -> tuple[int, tuple[str, ...]]:
    """(number of rows, names of columns)"""
    num_rows, names = 0, ()
    writer = csv.writer(file)
    for table in read_columns(output, lambda schema: schema.names):
        if not num_rows:
            names = tuple(table.column_names)
            if is_csv:
                writer.writerow(names)
        num_rows += table.num_rows
        for row in table.to_pylist():
            if is_csv:
                writer.writerow(_cell(value) for value in row.values())
            else:
                print(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False), file=file)
    return num_rows, names


def _batches(source: str) -> Iterator[pa.RecordBatch]:
    if source.startswith(HUB) or any((Path(source) / name).is_file() for name in SAVED_DATASET):
        yield from _huggingface(source)
        return
    for file in _text_files(source):
        yield from _csv(file) if file.suffix in (".csv", ".tsv") else _json(file)


def _text_files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        found = [file for file in path.rglob("*") if not is_hidden(str(file.relative_to(path)))]
        found = [file for file in found if file.suffix in TEXT_SUFFIXES]
    elif has_magic(source) and not path.exists():
        anchor = Path(path.anchor or ".")
        found = list(anchor.glob(str(path.relative_to(path.anchor)) if path.anchor else source))
    else:
        found = [path]
    wrong = [file for file in found if file.suffix not in TEXT_SUFFIXES or not file.is_file()]
    if wrong or not found:
        got = shown(str(wrong[0])) if wrong else f"{shown(source)} with no such file"
        raise JobRefused([Problem("SOURCE", got, f"files that end in {', '.join(TEXT_SUFFIXES)}")])
    if len({file.suffix in (".csv", ".tsv") for file in found}) > 1:
        raise JobRefused([Problem("SOURCE", f"{shown(source)} with JSON and CSV", "one of them")])
    return sorted(found)


def _csv(file: Path) -> Iterator[pa.RecordBatch]:
    """Types are found in the first 16 MiB. A later value of another type is an error and does not become text."""
    parse = arrow_csv.ParseOptions(delimiter="\t" if file.suffix == ".tsv" else ",", newlines_in_values=True)
    read = arrow_csv.ReadOptions(block_size=READ_BYTES)
    try:
        with arrow_csv.open_csv(file, read_options=read, parse_options=parse) as reader:
            yield from reader
    except pa.ArrowInvalid as error:
        raise JobRefused([Problem("SOURCE", f"{shown(str(file))} ({_first_line(error)})", "CSV with names")]) from None


def _json(file: Path) -> Iterator[pa.RecordBatch]:
    """The same for JSON lines. A key that appears only after the first 16 MiB is an error, too."""
    try:
        with arrow_json.open_json(file, read_options=arrow_json.ReadOptions(block_size=READ_BYTES)) as reader:
            yield from reader
    except pa.ArrowInvalid as error:
        raise JobRefused([Problem("SOURCE", f"{shown(str(file))} ({_first_line(error)})", "JSON lines")]) from None


def _first_line(error: Exception) -> str:
    """The first line of Arrow's message, without the row's text that it quotes."""
    line = str(error).splitlines()[0]
    return _QUOTED_VALUE.sub("invalid value", _QUOTED_ROW.sub(r"\1", line))[:200]


def _huggingface(source: str) -> Iterator[pa.RecordBatch]:
    try:
        import datasets
    except ImportError:
        raise JobRefused(
            [Problem("SOURCE", shown(source), "datasets installed: pip install 'segue[datasets]'")]
        ) from None
    if source.startswith(HUB):
        name, _, split = source.removeprefix(HUB).partition(":")
        loaded: Any = datasets.load_dataset(name, split=split or "train", streaming=False)
    else:
        loaded = datasets.load_from_disk(source)
    if isinstance(loaded, dict):
        wanted = f"a folder of one of its splits: {', '.join(f'{source}/{name}' for name in loaded)}"
        raise JobRefused([Problem("SOURCE", f"{shown(source)}, which has several", wanted)])
    yield from loaded.with_format("arrow").iter(batch_size=1000)


def _pieces(batches: Iterator[pa.RecordBatch], rows_per_file: int) -> Iterator[pa.Table]:
    """Tables of `rows_per_file` rows, the last one with the rest; one empty table if there are no rows."""
    kept: list[pa.Table] = []
    count = num_tables = 0
    for batch in batches:
        table = batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch])
        if kept and table.schema != kept[0].schema:
            got = f"columns {table.schema.names}" if table.schema.names != kept[0].schema.names else "other types"
            raise JobRefused(
                [Problem("SOURCE", f"{got} in a later part", f"those of the first: {kept[0].schema.names}")]
            )
        kept.append(table)
        count += table.num_rows
        while count >= rows_per_file:
            whole = pa.concat_tables(kept)
            yield whole.slice(0, rows_per_file)
            num_tables += 1
            kept, count = [whole.slice(rows_per_file)], count - rows_per_file
    if kept and (count or not num_tables):
        yield pa.concat_tables(kept)


def _cell(value: Any) -> Any:
    plain = _plain(value)
    return json.dumps(plain, ensure_ascii=False) if isinstance(plain, dict | list) else plain


def _plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    return value
