"""A batch file of OpenAI's format as a Parquet dataset, a row a line.

A line that cannot be answered costs itself: it becomes a row without a prompt that says why. Knows files; what a
request is, is `pipeline/formats/openai_request.py`'s. No model, no Ray.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from segue.pipeline.formats.openai_request import ENDPOINTS, BadRequest, asked_by, parse_line
from segue.pipeline.ledger.manifest import ForeignOutput
from segue.pipeline.problems import JobRefused, Problem, shown
from segue.pipeline.storage.store import OutputStorageError

MAX_LINE_BYTES = 64 * 2**20
ROWS_PER_GROUP = 4096
GROUP_CHARS = 32 * 2**20  # held in memory at once
SOURCE_KEY = b"segue_source"  # of the Parquet file: sha256 of the file of requests

_PART = pa.struct([("type", pa.string()), ("text", pa.string())])
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.list_(_PART))])
SCHEMA = pa.schema(
    [
        ("custom_id", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("prompt", pa.string()),
        ("sampling_params", pa.string()),  # JSON
        ("request_error", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class ImportedRequests:
    """A file of requests as a dataset."""

    path: str  # of the Parquet file
    endpoint: str
    num_rows: int


def import_requests(path: str, folder: str) -> ImportedRequests:
    """The Parquet file in `folder` that has the requests of `path`, a row a line; made if it is not there.

    Raises JobRefused if `path` cannot be read or is no file of requests, ForeignOutput if the folder has those of
    another file.
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
    except OutputStorageError:  # an OSError as well, and not the file's
        raise
    except OSError as error:
        raise JobRefused([Problem("", f"{shown(path)} ({error.strerror})", "a file of requests")]) from None
    return ImportedRequests(str(target), endpoint, pq.read_metadata(target).num_rows)


def _endpoint_of(file: BinaryIO, path: str) -> str:
    """Of the first line that is a request. Raises JobRefused if there is none for which there is an answer."""
    for raw in _lines(file):
        try:
            url = parse_line(raw or b"").url
        except BadRequest:
            continue
        if url in ENDPOINTS:
            return url
        raise JobRefused([Problem("url", shown(url), f"one of {', '.join(ENDPOINTS)}", where=path)])
    wanted = 'lines such as {"custom_id": ..., "method": "POST", "url": ..., "body": {...}}'
    raise JobRefused([Problem("", "no request in it", wanted, where=path)])


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Each that is not empty; None for one that is too long, which is read to its end."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            if line.strip():
                yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield None


def _requests(file: BinaryIO, endpoint: str) -> Iterator[dict[str, Any]]:
    seen: set[bytes] = set()
    for raw in _lines(file):
        row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
        try:
            if raw is None:
                raise BadRequest(f"the line has more than {MAX_LINE_BYTES:,} bytes")
            line = parse_line(raw)
            row["custom_id"] = line.custom_id
            if (mark := hashlib.sha256(line.custom_id.encode()).digest()[:16]) in seen:
                raise BadRequest("custom_id: another line has the same")
            seen.add(mark)
            row |= asked_by(line, endpoint)
        except BadRequest as error:
            row["request_error"] = str(error)
        yield row


def _write(target: Path, digest: str, rows: Iterator[dict[str, Any]]) -> None:
    try:
        _write_rows(target, digest, rows)
    except (OSError, pa.ArrowException) as error:
        raise OutputStorageError(f"{target} cannot be written: {error}") from error


def _write_rows(target: Path, digest: str, rows: Iterator[dict[str, Any]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    schema = SCHEMA.with_metadata({SOURCE_KEY: digest.encode()})
    with pq.ParquetWriter(part, schema, compression="zstd") as writer:
        group: list[dict[str, Any]] = []
        size = 0
        for row in rows:
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


def _check_same(target: Path, digest: str, path: str) -> None:
    if (pq.read_schema(target).metadata or {}).get(SOURCE_KEY) != digest.encode():
        raise ForeignOutput(f"{target} has the requests of another file than {path}; name another --work folder")
