"""The command for OpenAI's batch files: the same file as one would upload, against a model of one's own."""

import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segue.jobs.commands.ending import counted, exit_codes, print_json, say
from segue.jobs.commands.options import AsJson, Overrides, Quiet, RequireAuth, absolute
from segue.jobs.commands.running import run_values

if TYPE_CHECKING:
    from segue.pipeline.formats.openai.requests_file import ImportedRequests
    from segue.pipeline.formats.openai.results import Exported

MAX_TOKENS = 4096
SHOWN_REASONS = 10
NOTHING_ANSWERED = 3  # exit code: too many rows have errors


def batch(
    requests: Annotated[str, typer.Argument(metavar="REQUESTS.jsonl", help="one request a line, as for /v1/batches")],
    model: Annotated[str, typer.Option(help="a folder, a hub id, s3://, a .gguf file, package://NAME/FILE")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="RESULTS.jsonl", help="the answers")],
    errors: Annotated[str | None, typer.Option(metavar="ERRORS.jsonl", help="default: beside the answers")] = None,
    work: Annotated[str | None, typer.Option(metavar="FOLDER", help="default: RESULTS.jsonl.work")] = None,
    max_tokens: Annotated[int, typer.Option(help="of a request that does not say", min=1)] = MAX_TOKENS,
    overrides: Overrides = None,
    json_only: AsJson = False,
    quiet: Quiet = False,
    require_auth: RequireAuth = False,
) -> None:
    """Answer a batch file of OpenAI's format. Stopped, it goes on with the same command; ends in a Batch, as JSON.

    Exit code 3 if no line at all was answered.
    """
    with exit_codes():
        from segue.pipeline.formats.openai.requests_file import import_requests
        from segue.pipeline.formats.openai.results import (
            ResultsFiles,
            batch_object,
            check_writable,
            export_results,
            is_complete,
        )

        started = int(time.time())
        folder = absolute(work or output + ".work")
        failed = errors or f"{os.path.splitext(output)[0]}.errors.jsonl"
        check_writable(output, failed)
        imported = import_requests(requests, os.path.join(folder, "in"))
        done: str | None = None
        if imported.num_rows:
            job = _job_of(imported, model, os.path.join(folder, "out"), max_tokens)
            summary = run_values(job, overrides or [], quiet=quiet, json_only=json_only)
            if not is_complete(summary.output):
                print_json(asdict(summary))
                raise typer.Exit(summary.exit_code)
            done = summary.output
        exported = export_results(imported, done, ResultsFiles(output, failed, model, started))
        _say_results(output, failed, exported)
        ids = {"id": f"batch_{os.path.basename(output)}", "input_file_id": requests}
        files = {"output_file_id": output, "error_file_id": failed}
        times = {"created_at": started, "failed_at" if exported.has_failed else "completed_at": int(time.time())}
        print_json(batch_object(imported.endpoint, exported, **ids, **files, **times))
    raise typer.Exit(NOTHING_ANSWERED if exported.has_failed else 0)


def _job_of(imported: "ImportedRequests", model: str, output: str, max_tokens: int) -> dict[str, Any]:
    """The job file that answers the requests."""
    from segue.pipeline.formats.openai.parameters import CHAT

    columns = {f"{name}_column": name for name in imported.template_columns}
    is_chat = imported.endpoint == CHAT
    return {
        "name": "batch",
        "model": {"source": absolute(model) if os.path.exists(model) else model},
        "input": {"path": imported.path},
        "prompt": {"format": "chat", "messages_column": "messages"} | columns if is_chat else {"format": "text"},
        "sampling_params": {"max_tokens": max_tokens},
        "output": {"path": output, "columns": ["custom_id", "line"]},
        "limits": {"max_error_rate": 1.0},
    }


def _say_results(output: str, failed: str, exported: "Exported") -> None:
    counts = exported.counts
    say(f"{output}: {counted(counts.completed, 'answer')}; {failed}: {counted(counts.failed, 'error')}")
    for reason, count in exported.reasons.most_common(SHOWN_REASONS):
        say(f"  {count:,} x {reason}")
    if exported.has_failed:
        say("no request was answered")
