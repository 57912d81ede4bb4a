"""The text files that a source of a conversion names, and how each is to be read. Opens none of them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from segue.pipeline.dataset.listing import SUFFIX, has_magic, is_hidden
from segue.pipeline.formats.lines import COMPRESSIONS
from segue.pipeline.problems import JobRefused, Problem, nearest, shown

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
WANTED = (
    f"files that end in {', '.join((*JSON_SUFFIXES, *DELIMITERS))}, perhaps with {' or '.join(COMPRESSIONS)} after it"
)

Format = Literal["csv", "json"]


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Files of one format, by path."""

    format: Format
    files: tuple[Path, ...]


def text_files(source: str) -> TextFiles:
    """The files of a path, folder or glob. Raises JobRefused if there are none, others, or both of JSON and CSV."""
    found = _found(source)
    wrong = [file for file in found if not _suffix(file)]
    if wrong:
        hint = f"{SUFFIX} files need no conversion: name them in input.path" if wrong[0].suffix == SUFFIX else ""
        raise JobRefused([Problem("SOURCE", shown(str(wrong[0])), WANTED, hint)])
    formats: set[Format] = {format_of(file) for file in found}
    if len(formats) > 1:
        raise JobRefused([Problem("SOURCE", f"{shown(source)} with JSON and CSV", "one of them")])
    return TextFiles(formats.pop(), tuple(sorted(found)))


def format_of(file: Path) -> Format:
    return "csv" if _suffix(file) in DELIMITERS else "json"


def delimiter_of(file: Path) -> str:
    """What separates the fields of a CSV or TSV file, by its name."""
    return DELIMITERS[_suffix(file)]


def _found(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        inside = [file for file in path.rglob("*") if not is_hidden(str(file.relative_to(path))) and file.is_file()]
        found = [file for file in inside if _suffix(file)]
    elif has_magic(source) and not path.exists():
        anchor = Path(path.anchor or ".")
        matching = anchor.glob(str(path.relative_to(path.anchor)) if path.anchor else source)
        found = [file for file in matching if file.is_file()]
    elif path.is_file():
        found = [path]
    else:
        raise JobRefused([_missing(path)])
    if not found:
        raise JobRefused([Problem("SOURCE", f"{shown(source)} with no such file", WANTED)])
    return found


def _missing(path: Path) -> Problem:
    if os.path.lexists(path):
        return Problem("SOURCE", f"{shown(str(path))}, which is no regular file", "an existing file, folder or glob")
    names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    got = f"{shown(str(path))}, which does not exist"
    return Problem("SOURCE", got, "an existing file, folder or glob", nearest(path.name, names))


def _suffix(file: Path) -> str:
    """The suffix that tells the format, "" if there is none."""
    name = file.with_suffix("") if file.suffix in COMPRESSIONS else file
    return name.suffix if name.suffix in (*DELIMITERS, *JSON_SUFFIXES) else ""
