"""Data in other formats to a Parquet dataset: complete, or not at all, and never by a guess.

A line that cannot be read ends the conversion and is named by file and number: nobody would notice rows that are
missing. JSON keeps its own types; columns of CSV are text unless a type is named or inference asked for. Text files are
read twice, first for the types. Knows no model and no job.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from segue.pipeline.formats.column_types import ColumnType, check_known
from segue.pipeline.formats.csv_rows import CsvFile, check_delimiter
from segue.pipeline.formats.huggingface import HuggingFaceDataset, is_huggingface
from segue.pipeline.formats.inference import InferredType
from segue.pipeline.formats.json_rows import json_rows
from segue.pipeline.formats.lines import UTF8, SourceRow, check_encoding
from segue.pipeline.formats.parquet_files import ParquetFiles, check_new_folder
from segue.pipeline.formats.shapes import Shape
from segue.pipeline.formats.sources import delimiter_of, text_files
from segue.pipeline.formats.tables import tables_of
from segue.pipeline.problems import JobRefused, Problem, shown

MAX_NOTES = 20


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How text files are read."""

    types: Mapping[str, ColumnType] = field(default_factory=dict)  # of columns that the user names
    infer: bool = False  # the types of the other columns of CSV
    encoding: str = UTF8
    delimiter: str | None = None  # of CSV; None: by the file's name


@dataclass(frozen=True, slots=True)
class Converted:
    """The result of a conversion."""

    path: str
    num_rows: int
    num_files: int
    columns: tuple[str, ...]
    types: tuple[str, ...] = ()  # of the columns, by Arrow's names
    notes: tuple[str, ...] = ()  # what a user might not expect


def to_parquet(source: str, folder: str, rows_per_file: int, options: ReadOptions | None = None) -> Converted:
    """Write a dataset of Parquet files into `folder`, which must be new or empty.

    `source` is a file, folder or glob of JSON Lines, of files with an array of objects, or of CSV (comma) or TSV whose
    first line has the names, perhaps compressed; or a folder that `datasets.save_to_disk` wrote; or `hf:NAME[:SPLIT]`,
    a dataset on Hugging Face's hub. Raises JobRefused, and OutputStorageError if the folder cannot be written.
    """
    check_new_folder(Path(folder))
    found = _source(source, options or ReadOptions())
    with ParquetFiles(Path(folder), found.schema, rows_per_file) as files:
        for table in found.tables():
            files.add(table)
        files.close()
    stored = files.stored_schema()
    kinds = tuple(str(each.type) for each in stored)
    return Converted(folder, files.num_added, files.num_files, tuple(stored.names), kinds, found.notes)


@dataclass(frozen=True, slots=True)
class _TextSource:
    """Files whose columns have types."""

    files: tuple["_File", ...]
    types: Mapping[str, ColumnType]
    notes: tuple[str, ...]

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([pa.field(name, kind.arrow) for name, kind in self.types.items()])

    def tables(self) -> Iterator[pa.Table]:
        is_csv = isinstance(self.files[0], CsvFile)
        return tables_of((row for file in self.files for row in file.rows()), self.types, is_csv=is_csv)


@dataclass(frozen=True, slots=True)
class _HuggingFaceSource:
    dataset: HuggingFaceDataset
    notes: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema:
        return self.dataset.schema

    def tables(self) -> Iterator[pa.Table]:
        return self.dataset.tables()


@dataclass(frozen=True, slots=True)
class _JsonFile:
    path: Path
    encoding: str

    def rows(self) -> Iterator[SourceRow]:
        return json_rows(self.path, self.encoding)


_File = CsvFile | _JsonFile


def _source(source: str, options: ReadOptions) -> _TextSource | _HuggingFaceSource:
    if is_huggingface(source):
        _check_only_csv(options, "a dataset whose columns have types", has_types=True)
        return _HuggingFaceSource(HuggingFaceDataset(source))
    check_encoding(options.encoding)
    check_delimiter(options.delimiter)
    found = text_files(source)
    if found.format == "csv":
        return _csv_source(found.files, options)
    _check_only_csv(options, "JSON, which has types of its own and no delimiter")
    return _json_source(found.files, options)


def _check_only_csv(options: ReadOptions, got: str, *, has_types: bool = False) -> None:
    """Refuse what would be ignored."""
    asked = {"--infer": options.infer, "--delimiter": options.delimiter is not None}
    asked |= {"--types": bool(options.types), "--encoding": options.encoding != UTF8} if has_types else {}
    wanted = "CSV or TSV" if not has_types else "text files"
    raise_for = [Problem(name, got, wanted) for name, is_asked in asked.items() if is_asked]
    if raise_for:
        raise JobRefused(raise_for)


def _csv_source(paths: tuple[Path, ...], options: ReadOptions) -> _TextSource:
    files = tuple(_csv_file(path, options) for path in paths)
    names = files[0].names
    for path, file in zip(paths, files, strict=True):
        if set(file.names) != set(names):
            raise JobRefused([_other_columns(path, file.names, paths[0], names)])
    check_known(options.types, names)
    inferred = {name: InferredType() for name in names if name not in options.types} if options.infer else {}
    for row in (row for file in files for row in file.rows()) if inferred else ():
        for name, kind in inferred.items():
            kind.see(row.values[name])
    text = ColumnType(pa.string())
    found = {name: ColumnType(kind.arrow_type()) for name, kind in inferred.items()} | dict(options.types)
    told = [f"{name} {kind.arrow}" for name, kind in found.items() if name in inferred and kind != text]
    notes = (f"inferred: {', '.join(told) or 'nothing but text'}",) if options.infer else ()
    return _TextSource(files, {name: found.get(name, text) for name in names}, notes)


def _csv_file(path: Path, options: ReadOptions) -> CsvFile:
    delimiter = options.delimiter or delimiter_of(path)
    return CsvFile(path, delimiter, options.encoding, is_asked_for=options.delimiter is not None)


def _other_columns(path: Path, names: list[str], first: Path, wanted: list[str]) -> Problem:
    lacks = [f"lacks {shown(name)}" for name in wanted if name not in names]
    more = [f"has {shown(name)}" for name in names if name not in wanted]
    got = ", ".join([*lacks, *more][:MAX_NOTES])
    return Problem("", f"a first line that {got}", f"the columns of {first}", where=f"{path}:1")


def _json_source(paths: tuple[Path, ...], options: ReadOptions) -> _TextSource:
    files = tuple(_JsonFile(path, options.encoding) for path in paths)
    shapes: dict[str, Shape] = {}
    keys_of = {file.path: _see(file, shapes, options.types) for file in files}
    if not shapes:
        raise JobRefused([Problem("SOURCE", f"{shown(str(paths[0]))} with no key in any row", "rows with keys")])
    check_known(options.types, shapes)
    types = {name: options.types.get(name) or ColumnType(shape.arrow_type()) for name, shape in shapes.items()}
    return _TextSource(files, types, tuple(_lacking(keys_of, shapes)))


def _see(file: _JsonFile, shapes: dict[str, Shape], types: Mapping[str, ColumnType]) -> set[str]:
    """Take the file's rows into account. The keys that they have."""
    keys: set[str] = set()
    for row in file.rows():
        for name, value in row.values.items():
            if name not in shapes:
                shapes[name] = Shape(name, name)
            if name not in types:
                shapes[name].see(value, row.place)
        keys |= row.values.keys()
    return keys


def _lacking(keys_of: Mapping[Path, set[str]], shapes: Mapping[str, Shape]) -> Iterator[str]:
    """Files of which no row has a column that others have."""
    for path, keys in list(keys_of.items())[:MAX_NOTES]:
        if missing := [shown(name) for name in shapes if name not in keys]:
            yield f"{path} has no {', '.join(missing[:MAX_NOTES])}: null in its rows"
