"""The output of a batch in the form that OpenAI's client reads: a file of results, a file of errors, and a `Batch`.

Lines stand in the order of the requests. Knows output folders and the format; no request and no Ray.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from segue.pipeline.formats.openai.logprobs import chat_logprobs, completion_logprobs, token_ids_in
from segue.pipeline.formats.openai.parameters import CHAT
from segue.pipeline.formats.openai.requests_file import BadLine, ImportedRequests
from segue.pipeline.formats.openai.tokens import ModelTokens
from segue.pipeline.formats.ordered_lines import OrderedLines
from segue.pipeline.formats.plain_values import json_line
from segue.pipeline.ledger.manifest import SUCCESS
from segue.pipeline.ledger.reading import manifest_of, read_columns
from segue.pipeline.problems import JobRefused, Problem, shown
from segue.pipeline.storage.open import open_store
from segue.pipeline.storage.store import OutputStorageError

BAD_REQUEST = "invalid_request"
MAX_LISTED = 100  # errors in a `Batch` that has failed


@dataclass(slots=True)
class RequestCounts:
    """OpenAI's `request_counts`."""

    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(slots=True)
class Exported:
    """What was written."""

    counts: RequestCounts = field(default_factory=RequestCounts)
    reasons: Counter[str] = field(default_factory=Counter)  # of errors, by code and message
    first_errors: list[dict[str, Any]] = field(default_factory=list)

    @property
    def has_failed(self) -> bool:
        """Whether no request at all was answered."""
        return self.counts.failed > 0 and self.counts.completed == 0


@dataclass(frozen=True, slots=True)
class ResultsFiles:
    """Where results go, and what they say of the batch."""

    results: str
    errors: str
    model: str
    created: int  # seconds since 1970


def export_results(requests: ImportedRequests, output: str | None, files: ResultsFiles) -> Exported:
    """Write a finished output as two files of JSON lines, one with answers and one with errors, keyed by `custom_id`.

    `output` is None if there was no request to answer. Each file is complete or missing. Raises OutputStorageError,
    ForeignOutput.
    """
    try:
        with ExitStack() as stack:
            good, bad = (stack.enter_context(OrderedLines(path)) for path in (files.results, files.errors))
            export = _Export(requests, files, good, bad)
            for line in requests.bad_lines():
                export.add_bad(line)
            if output is not None:
                tokens = stack.enter_context(_tokens_of(output))
                for table in read_columns(output, lambda schema: schema.names):
                    export.add_rows(table.to_pylist(), tokens)
            good.close()
            bad.close()
    except JobRefused as error:  # a file that cannot be written, after the work
        raise OutputStorageError(str(error)) from None
    return export.found


def is_complete(output: str) -> bool:
    """Whether the output has a row for every request."""
    return open_store(output).exists(SUCCESS)


def check_writable(*paths: str) -> None:
    """Check the folders of results before the work starts. Raises JobRefused."""
    folders = {os.path.dirname(os.path.abspath(path)) for path in paths}
    if missing := [folder for folder in sorted(folders) if not os.access(folder, os.W_OK)]:
        raise JobRefused([Problem("--output", shown(missing[0]), "a folder that is there and can be written to")])


def batch_object(endpoint: str, exported: Exported, **ids_and_times: Any) -> dict[str, Any]:
    """OpenAI's `Batch`, with the fields that mean something here. `ids_and_times` are further ones.

    Without any answer its status is `failed`, and it lists the first errors.
    """
    constant: dict[str, Any] = {"object": "batch", "completion_window": "24h", "status": "completed"}
    if exported.has_failed:
        constant |= {"status": "failed", "errors": {"object": "list", "data": exported.first_errors}}
    return constant | {"endpoint": endpoint, "request_counts": asdict(exported.counts), **ids_and_times}


def _tokens_of(output: str) -> ModelTokens:
    model = manifest_of(output).job["model"]
    return ModelTokens(model["source"], model.get("revision"))


class _Export:
    def __init__(self, requests: ImportedRequests, files: ResultsFiles, good: OrderedLines, bad: OrderedLines) -> None:
        self.found = Exported()
        self._is_chat = requests.endpoint == CHAT
        self._files, self._good, self._bad = files, good, bad

    def add_bad(self, line: BadLine) -> None:
        error = {"code": BAD_REQUEST, "message": line.message, "param": line.param, "line": line.line}
        self._add_error(line.line, line.custom_id, error)

    def add_rows(self, rows: Sequence[Mapping[str, Any]], tokens: ModelTokens) -> None:
        tokens.learn(each for row in rows for sample in _samples(row) for each in token_ids_in(sample["logprobs"]))
        for row in rows:
            if row["error"] is None:
                self._add_answer(row, tokens.bytes_of)
            else:
                error = {**row["error"], "param": None, "line": row["line"]}
                self._add_error(row["line"], row["custom_id"], error)

    def _add_answer(self, row: Mapping[str, Any], bytes_of: Callable[[int], bytes]) -> None:
        self.found.counts.total += 1
        self.found.counts.completed += 1
        request_id = _request_id(row["line"])
        body = self._body(row, request_id, bytes_of)
        response = {"status_code": 200, "request_id": request_id, "body": body}
        line = {"id": request_id, "custom_id": row["custom_id"], "response": response, "error": None}
        self._good.add("", row["line"], json_line(line))

    def _add_error(self, number: int, custom_id: str | None, error: dict[str, Any]) -> None:
        self.found.counts.total += 1
        self.found.counts.failed += 1
        self.found.reasons[f"{error['code']}: {error['message']}"] += 1
        if len(self.found.first_errors) < MAX_LISTED:
            self.found.first_errors.append(error)
        line = {"id": _request_id(number), "custom_id": custom_id, "response": None, "error": error}
        self._bad.add("", number, json_line(line))

    def _body(self, row: Mapping[str, Any], request_id: str, bytes_of: Callable[[int], bytes]) -> dict[str, Any]:
        samples = _samples(row)
        prompt, generated = row["num_input_tokens"], sum(sample["num_generated_tokens"] for sample in samples)
        return {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{request_id}",
            "object": "chat.completion" if self._is_chat else "text_completion",
            "created": self._files.created,
            "model": self._files.model,
            "choices": [self._choice(index, sample, bytes_of) for index, sample in enumerate(samples)],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": generated,
                "total_tokens": prompt + generated,
                "prompt_tokens_details": {"cached_tokens": row["num_cached_tokens"]},
            },
        }

    def _choice(self, index: int, sample: Mapping[str, Any], bytes_of: Callable[[int], bytes]) -> dict[str, Any]:
        text, logprobs = sample["generated_text"], None
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._is_chat else {"text": text}
        if sample["logprobs"] is not None:
            logprobs = (chat_logprobs if self._is_chat else completion_logprobs)(sample["logprobs"], bytes_of)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": sample["finish_reason"]}


def _samples(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return row["samples"] or [row]


def _request_id(line: int) -> str:
    return f"batch_req_{line:08d}"
