"""A batch file in OpenAI's format as a Parquet dataset with one row for each line.

A line that cannot be answered becomes a row without a prompt, which says why. Knows files; no model, no Ray.
`pipeline/formats/openai_request.py` knows what a request is.
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
GROUP_CHARS = 32 * 2**20  # that are held in memory at once
SOURCE_KEY = b"segue_source"  # key in the Parquet file's metadata: sha256 of the file of requests

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
    """The Parquet file in `folder` with the requests of `path`, one row for each line. It is written if it is missing.

    Raises JobRefused if `path` cannot be read or has no requests, ForeignOutput if the folder holds the requests of
    another file, OutputStorageError.
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
    return ImportedRequests(str(target), endpoint, pq.read_metadata(target).num_rows)


def _endpoint_of(file: BinaryIO, path: str) -> str:
    """The endpoint of the first line that is a request. Raises JobRefused if there is none, or an unknown endpoint."""
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
    """Each line that is not empty; None for a line that is too long."""
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
