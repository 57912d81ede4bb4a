"""An output folder to JSON Lines or CSV, one line for each row of the input, in the input's order.

Knows output folders and the two formats; no job file and no model.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from segue.pipeline.dataset.listing import is_local
from segue.pipeline.formats.ordered_lines import OrderedLines
from segue.pipeline.formats.plain_values import PlainValues, json_line
from segue.pipeline.ledger.completeness import check_complete
from segue.pipeline.ledger.manifest import MANIFEST, SUCCESS, ForeignOutput, Manifest
from segue.pipeline.ledger.reading import manifest_of, read_columns
from segue.pipeline.problems import JobRefused, Problem, shown
from segue.pipeline.storage.open import open_store

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*JSON_SUFFIXES, *DELIMITERS)


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of an export."""

    path: str
    num_rows: int
    num_files: int
    columns: tuple[str, ...]
    is_complete: bool  # whether every row of the job is in it
    num_missing: int  # rows that are planned and not committed
    num_changed: int  # values that the format cannot hold: null now, or with U+FFFD in them


def is_output(source: str) -> bool:
    """Whether a folder is an output folder of Segue."""
    return (not is_local(source) or os.path.isdir(source)) and open_store(source).exists(MANIFEST)


def from_output(output: str, path: str, *, is_partial: bool = False) -> Exported:
    """Write every committed row by (src_path, src_row): as CSV or TSV if `path` ends so, else as JSON Lines.

    In CSV, lists and structs are JSON, and null has no quotes while an empty text has. Values have the forms of
    `plain_values`. Raises ForeignOutput if the output is not finished, unless `is_partial`; OutputStorageError; and
    JobRefused if `output` is none of Segue's, or `path` cannot be written.
    """
    if not is_output(output):
        hint = "to make a dataset, name a folder as TARGET"
        raise JobRefused([Problem("SOURCE", shown(output), "an output folder of Segue, as TARGET is a file", hint)])
    manifest = manifest_of(output)
    if not is_partial:
        _check_finished(output, manifest)
    delimiter = next((sign for suffix, sign in DELIMITERS.items() if path.endswith(suffix)), "")
    plain, names = PlainValues(keeps_nan=bool(delimiter)), ()
    with OrderedLines(path) as lines:
        for table in read_columns(output, lambda schema: schema.names):
            names = tuple(table.column_names)
            places = zip(table["src_path"].to_pylist(), table["src_row"].to_pylist(), strict=True)
            for (group, row), values in zip(places, plain.rows(table), strict=True):
                lines.add(group, row, _line(names, values, delimiter))
        lines.close(_record(names, delimiter) if delimiter and names else "")
        num_rows = len(lines)
    num_missing = manifest.num_rows - num_rows
    is_complete = manifest.is_complete and not num_missing
    return Exported(path, num_rows, 1, names, is_complete, num_missing, plain.num_changed)


def check_target(path: str) -> None:
    """Raises JobRefused unless an output can become such a file."""
    if not path.endswith(SUFFIXES):
        wanted = f"a file that ends in {', '.join(SUFFIXES)}, since SOURCE is an output folder"
        raise JobRefused([Problem("TARGET", shown(path), wanted)])


def _check_finished(output: str, manifest: Manifest) -> None:
    store = open_store(output)
    if not (manifest.is_complete and store.exists(SUCCESS)):
        raise ForeignOutput(
            f"{output} is not finished: run its job again to finish it, or convert the rows that it has with --partial"
        )
    check_complete(store, manifest)


def _line(names: tuple[str, ...], values: Iterable[Any], delimiter: str) -> str:
    if delimiter:
        return _record(values, delimiter)
    return json_line(dict(zip(names, values, strict=True)))


def _record(values: Iterable[Any], delimiter: str) -> str:
    """A line of RFC 4180."""
    return delimiter.join(_field(value, delimiter) for value in values) + "\r\n"


def _field(value: Any, delimiter: str) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    is_plain = text and not any(sign in text for sign in (delimiter, '"', "\r", "\n"))
    return text if is_plain else f'"{text.replace(chr(34), chr(34) * 2)}"'
