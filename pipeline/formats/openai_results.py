"""The output of a batch in the form that OpenAI's client reads: a file of results, a file of errors, and a `Batch`.

Knows output folders and the format; no request, no model, no Ray.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from segue.pipeline.formats.openai_request import CHAT
from segue.pipeline.ledger.manifest import SUCCESS
from segue.pipeline.ledger.reading import read_columns
from segue.pipeline.problems import JobRefused, Problem, shown
from segue.pipeline.storage.open import open_store
from segue.pipeline.storage.store import OutputStorageError

BAD_REQUEST = "invalid_request"


@dataclass(slots=True)
class RequestCounts:
    """OpenAI's `request_counts`."""

    total: int = 0
    completed: int = 0
    failed: int = 0


def export_results(output: str, results: str, errors: str, *, endpoint: str, model: str, created: int) -> RequestCounts:
    """Write a finished output as two files of JSON lines, one with answers and one with errors, keyed by `custom_id`.

    Each file is complete or missing. Raises OutputStorageError, ForeignOutput.
    """
    try:
        return _export(output, results, errors, endpoint=endpoint, model=model, created=created)
    except OutputStorageError:
        raise
    except OSError as error:
        raise OutputStorageError(f"{results} or {errors} cannot be written: {error}") from error


def _export(output: str, results: str, errors: str, *, endpoint: str, model: str, created: int) -> RequestCounts:
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
    """Whether the output has a row for every request."""
    return open_store(output).exists(SUCCESS)


def check_writable(*paths: str) -> None:
    """Check the folders of results before the work starts. Raises JobRefused."""
    folders = {os.path.dirname(os.path.abspath(path)) for path in paths}
    if missing := [folder for folder in sorted(folders) if not os.access(folder, os.W_OK)]:
        raise JobRefused([Problem("--output", shown(missing[0]), "a folder that is there and can be written to")])


def batch_object(endpoint: str, counts: RequestCounts, **ids_and_times: Any) -> dict[str, Any]:
    """OpenAI's `Batch`, with the fields that mean something here. `ids_and_times` are further ones."""
    constant = {"object": "batch", "completion_window": "24h", "status": "completed"}
    return constant | {"endpoint": endpoint, "request_counts": asdict(counts), **ids_and_times}


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
