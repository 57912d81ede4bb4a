"""The lines of a text file, decoded: plain, .gz or .zst; and what is read from them, with its place.

Knows bytes and encodings; nothing of CSV or JSON.
"""

import codecs
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from segue.pipeline.problems import JobRefused, Problem, shown

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
UTF8 = "utf-8"
READ_BYTES = 2**20
_BOM = "\ufeff"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file, from 1."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A record of CSV or an object of JSON, before its values have types."""

    place: Place  # where it begins
    size: int  # characters of its text, about
    values: Mapping[str, Any]  # by column; of CSV texts and nulls, of JSON the values of `json_rows`


def refused(place: Place, key: str, got: str, wanted: str, hint: str = "") -> JobRefused:
    """What is wrong in one line."""
    return JobRefused([Problem(key, got, wanted, hint, where=str(place))])


def check_encoding(encoding: str) -> None:
    """Raises JobRefused unless Python knows this encoding of text."""
    try:
        "a".encode(encoding)
    except (LookupError, ValueError):
        raise JobRefused([Problem("--encoding", shown(encoding), "utf-8, latin-1, utf-16 or another")]) from None


def text_lines(file: Path, encoding: str = UTF8) -> Iterator[str]:
    """Every line with its line break, which is a line feed, perhaps after a carriage return. A byte order mark is left
    out. Raises JobRefused, which names the line of a byte that is not text.
    """
    pending: list[str] = []
    for text in _without_mark(_decoded(file, encoding)):
        first, *others = text.split("\n")
        pending.append(first)
        if others:
            yield "".join(pending) + "\n"
            yield from (line + "\n" for line in others[:-1])
            pending = [others[-1]]
    if rest := "".join(pending):
        yield rest


def _without_mark(texts: Iterator[str]) -> Iterator[str]:
    first = next(texts, "")
    yield first.removeprefix(_BOM)
    yield from texts


def _decoded(file: Path, encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    line, is_first = 1, True
    for chunk in _chunks(file):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _not_text(file, line, error, is_utf16=is_first and chunk.startswith(_UTF16)) from None
        line, is_first = line + text.count("\n"), False
        if text:
            yield text


def _chunks(file: Path) -> Iterator[bytes]:
    """The file's bytes, and b"" at the end."""
    try:
        with pa.input_stream(str(file), compression=COMPRESSIONS.get(file.suffix)) as stream:
            while chunk := stream.read(READ_BYTES):
                yield chunk
    except (OSError, pa.ArrowException) as error:
        what = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise JobRefused([Problem("", f"{what}", "a file that can be read", where=str(file))]) from None
    yield b""


def _not_text(file: Path, line: int, error: UnicodeDecodeError, *, is_utf16: bool) -> JobRefused:
    line += error.object[: error.start].decode(error.encoding, "replace").count("\n")
    hint = "utf-16" if is_utf16 else "latin-1 or another"
    got = f"a byte that is not {error.encoding} (0x{error.object[error.start]:02x})"
    return refused(Place(file, line), "", got, f"text in {error.encoding}", f"--encoding {hint}, if it is that")
