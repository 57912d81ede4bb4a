"""OpenAI's batch files: a file of requests to a Parquet dataset, an output folder to files of results and errors.

A line that is no request, or asks for what there is not, costs itself: it becomes a row without a prompt, and a line of
the file of errors that says why, without quoting it. Knows the format; no model, no Ray.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.manifest import SUCCESS, ForeignOutput
from pipeline.output import read_columns
from pipeline.problems import JobRefused, Problem, shown
from pipeline.store import OutputStorageError, open_store

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENDPOINTS = (CHAT, COMPLETIONS)
MAX_LINE_BYTES = 64 * 2**20
ROWS_PER_GROUP = 4096
GROUP_CHARS = 32 * 2**20  # held in memory at once
SOURCE_KEY = b"segue_source"  # of the Parquet file: sha256 of the file of requests
BAD_REQUEST = "invalid_request"
# Of a request, what changes no answer here.
_IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "stream_options", "safety_identifier", "prompt_cache_key", "model"}
)
# What changes the answer and is not there: named in errors, as other names would be the row's own text.
_UNSUPPORTED = frozenset(
    {"response_format", "tools", "tool_choice", "functions", "function_call", "logprobs", "top_logprobs", "logit_bias",
     "best_of", "echo", "suffix", "modalities", "audio", "prediction", "reasoning_effort", "web_search_options",
     "parallel_tool_calls", "verbosity"}
)  # fmt: skip
_SAYS_NOTHING = {
    "response_format": ({"type": "text"},), "tool_choice": ("none", "auto"), "best_of": (1,), "modalities": (["text"],),
    "parallel_tool_calls": (True, False), "top_logprobs": (0,), "logprobs": (False,),
}  # fmt: skip
# OpenAI's defaults where a request says nothing; ours are others.
DEFAULTS = {"temperature": 1.0, "top_p": 1.0}

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


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part]
    # What the client writes into answers of earlier turns.
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: list[None] | None = None

    def value(self) -> dict[str, Any]:
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        role = "system" if self.role == "developer" else self.role  # the newer name of the same
        return {"role": role, "content": [{"type": "text", "text": part} for part in parts]}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    messages: Annotated[list[_Message], Field(min_length=1)] | None = None
    prompt: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream: Literal[False] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, value: object) -> object:
        """Nulls are defaults, as the client writes them."""
        if not isinstance(value, dict):
            return value
        kept = {key: each for key, each in value.items() if key not in _IGNORED and each is not None}
        asked = {key for key, each in kept.items() if each not in _SAYS_NOTHING.get(key, (False, [], {}))}
        if named := sorted(_UNSUPPORTED & asked):
            raise ValueError(f"{', '.join(named)}: not supported")
        return {key: each for key, each in kept.items() if key not in _UNSUPPORTED}

    def params(self) -> dict[str, Any]:
        """Under our names, with OpenAI's defaults."""
        names = ("temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty")
        told = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.stop:
            told["stop"] = self.stop
        if (limit := self.max_completion_tokens or self.max_tokens) is not None:
            told["max_tokens"] = limit
        return DEFAULTS | told


class _Line(BaseModel):
    model_config = ConfigDict(strict=True)
    custom_id: Annotated[str, Field(min_length=1)]
    method: Literal["POST"] = "POST"
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ImportedRequests:
    """A file of requests as a dataset."""

    path: str  # of the Parquet file
    endpoint: str
    num_rows: int


@dataclass(slots=True)
class RequestCounts:
    """OpenAI's `request_counts`."""

    total: int = 0
    completed: int = 0
    failed: int = 0


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
    except OutputStorageError:
        raise
    except OSError as error:
        raise JobRefused([Problem("", f"{shown(path)} ({error.strerror})", "a file of requests")]) from None
    return ImportedRequests(str(target), endpoint, pq.read_metadata(target).num_rows)


def export_results(output: str, results: str, errors: str, *, endpoint: str, model: str, created: int) -> RequestCounts:
    """A finished output as two files of lines, each whole or not there; what the two have in common is `custom_id`.

    Raises OSError, OutputStorageError, ForeignOutput.
    """
    counts = RequestCounts()
    parts = results + ".part", errors + ".part"
    with open(parts[0], "w", encoding="utf-8") as good, open(parts[1], "w", encoding="utf-8") as bad:
        for table in read_columns(output, lambda schema: schema.names):
            for row in table.to_pylist():
                counts.total += 1
                request_id = f"batch_req_{row['src_row']:08d}"
                if row["error"] is not None:
                    counts.failed += 1
                    line = {"response": None, "error": _error(row)}
                else:
                    counts.completed += 1
                    body = _body(row, request_id, endpoint=endpoint, model=model, created=created)
                    line = {"response": {"status_code": 200, "request_id": request_id, "body": body}, "error": None}
                text = json.dumps({"id": request_id, "custom_id": row["custom_id"], **line})
                print(text, file=bad if row["error"] is not None else good)
    for part, whole in zip(parts, (results, errors), strict=True):
        os.replace(part, whole)
    return counts


def is_complete(output: str) -> bool:
    """Whether every request has its row."""
    return open_store(output).exists(SUCCESS)


def check_writable(*paths: str) -> None:
    """Before the work whose results go there. Raises JobRefused."""
    folders = {os.path.dirname(os.path.abspath(path)) for path in paths}
    if missing := [folder for folder in sorted(folders) if not os.access(folder, os.W_OK)]:
        raise JobRefused([Problem("--output", shown(missing[0]), "a folder that is there and can be written to")])


def batch_object(imported: ImportedRequests, counts: RequestCounts, **files: Any) -> dict[str, Any]:
    """OpenAI's `Batch`, as far as it means something here."""
    return {"object": "batch", "endpoint": imported.endpoint, "completion_window": "24h", "status": "completed"} | {
        "request_counts": {"total": counts.total, "completed": counts.completed, "failed": counts.failed},
        **files,
    }


def _endpoint_of(file: BinaryIO, path: str) -> str:
    """Of the first line that is a request. Raises JobRefused if there is none for which there is an answer."""
    for raw in _lines(file):
        try:
            url = _Line.model_validate_json(raw or b"").url
        except ValidationError:
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
        row = dict.fromkeys(SCHEMA.names)
        try:
            if raw is None:
                raise ValueError(f"the line has more than {MAX_LINE_BYTES:,} bytes")
            line = _Line.model_validate_json(raw)
            row["custom_id"] = line.custom_id
            if (mark := hashlib.sha256(line.custom_id.encode()).digest()[:16]) in seen:
                raise ValueError("custom_id: another line has the same")
            seen.add(mark)
            row |= _request(line, endpoint)
        except ValidationError as error:
            row["request_error"] = _told(error)
        except ValueError as error:
            row["request_error"] = str(error)
        yield row


def _request(line: _Line, endpoint: str) -> dict[str, Any]:
    if line.url != endpoint:
        raise ValueError(f"url: wanted {endpoint}, as in the first line of the file")
    body = _Body.model_validate(line.body)
    if endpoint == CHAT and body.messages is None:
        raise ValueError("body.messages: missing")
    if endpoint == COMPLETIONS and body.prompt is None:
        raise ValueError("body.prompt: missing, or not one text")
    messages = [message.value() for message in body.messages or ()] if endpoint == CHAT else None
    prompt = body.prompt if endpoint == COMPLETIONS else None
    return {"messages": messages, "prompt": prompt, "sampling_params": json.dumps(body.params())}


def _told(error: ValidationError) -> str:
    """The first thing that is wrong, in words that are not the row's."""
    first = error.errors(include_input=False, include_url=False)[0]
    if first["type"] == "extra_forbidden":
        return "a parameter that is not known"
    known = {*_Line.model_fields, *_Body.model_fields, *_Message.model_fields, *_Part.model_fields}
    place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in known)
    if first["type"] == "json_invalid":
        return "the line is not JSON in UTF-8"  # a lone surrogate neither
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


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


def _error(row: dict[str, Any]) -> dict[str, str]:
    if row["request_error"] is not None:
        return {"code": BAD_REQUEST, "message": row["request_error"]}
    return {"code": row["error"]["code"], "message": row["error"]["message"]}


def _body(row: dict[str, Any], request_id: str, *, endpoint: str, model: str, created: int) -> dict[str, Any]:
    samples: Sequence[dict[str, Any]] = row.get("samples") or [row]
    is_chat = endpoint == CHAT
    prompt, generated = row["num_input_tokens"], sum(sample["num_generated_tokens"] for sample in samples)
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request_id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [_choice(index, sample, is_chat=is_chat) for index, sample in enumerate(samples)],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": row["num_cached_tokens"]},
        },
    }


def _choice(index: int, sample: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
    text = sample["generated_text"]
    said = {"message": {"role": "assistant", "content": text, "refusal": None}} if is_chat else {"text": text}
    return {"index": index, **said, "logprobs": None, "finish_reason": sample["finish_reason"]}
