"""A batch file in OpenAI's format as a Parquet dataset with one row for each request, and a file of the bad lines.

A line that cannot be answered is no row of the dataset: its error is kept until results are written. Knows files; no
model, no Ray. `pipeline/formats/openai/request.py` knows what a request is.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from segue.pipeline.formats.openai.messages import MESSAGE
from segue.pipeline.formats.openai.parameters import ENDPOINTS
from segue.pipeline.formats.openai.request import BadRequest, RequestLine, asked_by, parse_line
from segue.pipeline.ledger.manifest import ForeignOutput
from segue.pipeline.problems import JobRefused, Problem, shown
from segue.pipeline.storage.store import OutputStorageError

MAX_LINE_BYTES = 64 * 2**20
ROWS_PER_GROUP = 4096
GROUP_CHARS = 32 * 2**20  # that are held in memory at once
SOURCE_KEY = b"segue_source"  # key in the Parquet file's metadata: sha256 of the file of requests
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # JSON; of the requests that have them
_BOM = b"\xef\xbb\xbf"

SCHEMA = pa.schema(
    [
        ("line", pa.int64()),  # of the file, from 1
        ("custom_id", pa.string()),
        ("messages", pa.list_(MESSAGE)),
        ("prompt", pa.string()),
        *((name, pa.string()) for name in TEMPLATE_COLUMNS),
        ("sampling_params", pa.string()),  # JSON
    ]
)


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request that can be answered."""

    line: int  # from 1
    custom_id: str | None  # as far as it can be read
    message: str
    param: str | None  # the parameter that is wrong


@dataclass(frozen=True, slots=True)
class ImportedRequests:
    """A file of requests as a dataset."""

    path: str  # of the Parquet file
    endpoint: str
    num_rows: int  # requests; the bad lines are not among them
    template_columns: tuple[str, ...]  # of TEMPLATE_COLUMNS, those that some request has

    def bad_lines(self) -> Iterator[BadLine]:
        with open(_bad_path(Path(self.path)), encoding="utf-8") as file:
            for line in file:
                yield BadLine(**json.loads(line))


def import_requests(path: str, folder: str) -> ImportedRequests:
    """The requests of `path` as a Parquet file in `folder`. It is written if it is missing.

    Raises JobRefused if `path` cannot be read or has no line that names an endpoint, ForeignOutput if the folder holds
    the requests of another file, OutputStorageError.
    """
    target = Path(folder) / "requests.parquet"
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            endpoint = _endpoint_of(file, path)
            if target.exists():
                _check_same(target, digest, path)
            else:
                file.seek(0)
                _write(target, digest, _requests(file, endpoint))
    except OutputStorageError:  # is an OSError, too, but not one of `path`
        raise
    except OSError as error:
        raise JobRefused([Problem("", f"{shown(path)} ({error.strerror})", "a file of requests")]) from None
    return ImportedRequests(str(target), endpoint, pq.read_metadata(target).num_rows, _template_columns(target))


def _endpoint_of(file: BinaryIO, path: str) -> str:
    """The endpoint of the first line that names one. Raises JobRefused if there is none."""
    wanted = 'lines such as {"custom_id": ..., "method": "POST", "url": ..., "body": {...}}'
    found: list[Problem] = []
    for number, raw in _lines(file):
        try:
            url = parse_line(raw or b"").url
        except BadRequest as error:
            found.append(Problem("", str(error), wanted, where=f"{path}:{number}"))
            continue
        if url in ENDPOINTS:
            return url
        found.append(Problem("url", shown(url), f"one of {', '.join(ENDPOINTS)}", where=f"{path}:{number}"))
    raise JobRefused(found[:1] or [Problem("", "no line", wanted, where=path)])


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Each line that is not empty, with its number from 1; None for a line that is too long."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        is_whole = len(line) <= MAX_LINE_BYTES
        text = line.removeprefix(_BOM) if number == 1 else line
        while line and not (is_whole or line.endswith(b"\n")):
            line = file.readline(MAX_LINE_BYTES)
        if text.strip():
            yield number, text if is_whole else None


def _requests(file: BinaryIO, endpoint: str) -> Iterator[dict[str, Any] | BadLine]:
    """A row or a bad line for each line."""
    seen: dict[bytes, int] = {}
    for number, raw in _lines(file):
        line = RequestLine({})
        try:
            if raw is None:
                raise BadRequest(f"the line has more than {MAX_LINE_BYTES:,} bytes")
            line = parse_line(raw)
            row = asked_by(line, endpoint)
            mark = hashlib.sha256(str(line.custom_id).encode()).digest()[:16]
            if (other := seen.setdefault(mark, number)) != number:
                raise BadRequest(f"custom_id: line {other} has the same", "custom_id")
            yield dict.fromkeys(SCHEMA.names) | {"line": number, "custom_id": line.custom_id} | row
        except BadRequest as error:
            yield BadLine(number, line.custom_id, str(error), error.param)


def _write(target: Path, digest: str, rows: Iterator[dict[str, Any] | BadLine]) -> None:
    try:
        _write_rows(target, digest, rows)
    except (OSError, pa.ArrowException) as error:
        raise OutputStorageError(f"{target} cannot be written: {error}") from error


def _write_rows(target: Path, digest: str, rows: Iterator[dict[str, Any] | BadLine]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    schema = SCHEMA.with_metadata({SOURCE_KEY: digest.encode()})
    with ExitStack() as stack:
        writer = stack.enter_context(pq.ParquetWriter(part, schema, compression="zstd"))
        bad = stack.enter_context(open(_bad_path(target), "w", encoding="utf-8"))
        group: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            if isinstance(row, BadLine):
                print(json.dumps(asdict(row)), file=bad)
                continue
            group.append(row)
            size += len(str(row["messages"] or row["prompt"] or ""))
            if len(group) == ROWS_PER_GROUP or size > GROUP_CHARS:
                _flush(writer, group)
                size = 0
        _flush(writer, group)
    os.replace(part, target)


def _flush(writer: pq.ParquetWriter, group: list[dict[str, Any]]) -> None:
    if group:
        writer.write_table(pa.Table.from_pylist(group, writer.schema))
        group.clear()


def _bad_path(target: Path) -> Path:
    return target.with_name("bad_lines.jsonl")


def _template_columns(target: Path) -> tuple[str, ...]:
    table = pq.read_table(target, columns=list(TEMPLATE_COLUMNS))
    return tuple(name for name in TEMPLATE_COLUMNS if table[name].null_count < table.num_rows)


def _check_same(target: Path, digest: str, path: str) -> None:
    if (pq.read_schema(target).metadata or {}).get(SOURCE_KEY) != digest.encode():
        raise ForeignOutput(f"{target} has the requests of another file than {path}; name another --work folder")
