"""The commands of a cluster's queue: submit, logs, cancel. Knows the queue and what to say of it."""

import os
from collections import deque
from typing import TYPE_CHECKING, Annotated

import typer

from segue.jobs.commands.ending import exit_codes, print_json, say
from segue.jobs.commands.options import AsJson, Limit, Output, Overrides, Quiet, RequireAuth, Sample, overrides_of

if TYPE_CHECKING:
    from segue.pipeline.submit.job_queue import JobQueue, JobState

FAILED_WITHOUT_A_CODE, STOPPED, INTERRUPTED = 4, 143, 130
LAST_LINES = 20

AnyJobFile = Annotated[str, typer.Argument(metavar="JOB.yaml", help="a job file for segue run or segue finetune")]
SubmissionId = Annotated[str, typer.Argument(metavar="ID", help="a submission id, as segue submit says it")]
Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        help="the cluster's dashboard, http://HOST:8265; its token is taken from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH",
    ),
]


def submit(
    job: AnyJobFile,
    address: Address,
    overrides: Overrides = None,
    limit: Limit = None,
    sample: Sample = None,
    output: Output = None,
    wait: Annotated[bool, typer.Option("--wait", help="show its log, and exit as it does")] = False,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="send this installation's code along; else the cluster's own runs")
    ] = False,
    runtime_env: Annotated[str | None, typer.Option(metavar="FILE.yaml", help="Ray's runtime environment")] = None,
    json_only: AsJson = False,
    quiet: Quiet = False,
    require_auth: RequireAuth = False,
) -> None:
    """Hand a job file to a Ray cluster. One that is at work is not started twice, one that stopped goes on."""
    with exit_codes():
        from segue.pipeline.submit.job_queue import JobQueue
        from segue.pipeline.submit.submission import read_runtime_env, read_submitted

        submitted = read_submitted(job, overrides_of(overrides, limit, output, sample))
        env = read_runtime_env(runtime_env)
        queue = _queue(JobQueue, address)
        for path in submitted.local_paths:
            say(f"warning: {path} is a local path: every node of the cluster has to find the same there")
        submission_id, is_new = queue.submit(submitted, env, with_code=with_code)
        say(f"{submission_id}: {'submitted' if is_new else 'is at work already; nothing was submitted'}")
        if not wait:
            say(f"next: segue logs {submission_id} --follow --address {address}; segue status {submitted.output}")
            print_json({"submission_id": submission_id, "is_new": is_new, "output": submitted.output})
            return
        code = _follow(queue, submission_id, quiet=quiet, json_only=json_only)
    raise typer.Exit(code)


def logs(
    submission_id: SubmissionId,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", help="until it has ended; exit as it does")] = False,
    require_auth: RequireAuth = False,
) -> None:
    """What a submitted job has said."""
    code = 0
    with exit_codes():
        from segue.pipeline.submit.job_queue import JobQueue

        queue = _queue(JobQueue, address)
        if follow:
            code = _follow(queue, submission_id, quiet=False, json_only=False)
        else:
            print(queue.logs(submission_id), end="", flush=True)
    raise typer.Exit(code)


def cancel(
    submission_id: SubmissionId, address: Address, json_only: AsJson = False, require_auth: RequireAuth = False
) -> None:
    """Stop a submitted job. What it has committed stays; submitted again, it goes on from there."""
    with exit_codes():
        from segue.pipeline.submit.job_queue import JobQueue

        state = _queue(JobQueue, address).cancel(submission_id)
        if not json_only:
            say(f"{submission_id}: {state.status.lower()}")
        print_json(_state_json(state))
    raise typer.Exit(0 if state.has_ended else FAILED_WITHOUT_A_CODE)


def _queue(queue: "type[JobQueue]", address: str) -> "JobQueue":
    made = queue(address)
    for warning in made.warnings:
        say(f"warning: {warning}")
    return made


def _follow(queue: "JobQueue", submission_id: str, *, quiet: bool, json_only: bool) -> int:
    """Its log on stderr, its result on stdout; the exit code of its command."""
    from segue.pipeline.submit.job_queue import last_json

    lines: deque[str] = deque(maxlen=LAST_LINES)  # the result is among them

    def hear(line: str) -> None:
        lines.append(line)
        if not quiet:
            say(line)

    try:
        state = queue.follow(submission_id, hear)
    except KeyboardInterrupt:
        address = os.environ["RAY_API_SERVER_ADDRESS"]
        say(f"{submission_id} goes on; segue logs {submission_id} --follow --address {address}, or segue cancel")
        return INTERRUPTED
    if not json_only and (state.status != "SUCCEEDED" or quiet):
        say(f"{submission_id}: {state.status.lower()}")
    print_json(_state_json(state) | {"result": last_json(tuple(lines))})
    return exit_code_of(state)


def exit_code_of(state: "JobState") -> int:
    """Of the job's command, where it has one."""
    if state.status == "SUCCEEDED":
        return 0
    if state.status == "STOPPED":
        return STOPPED
    code = state.exit_code or FAILED_WITHOUT_A_CODE
    return 128 - code if code < 0 else code  # of a signal, as a shell has it


def _state_json(state: "JobState") -> dict[str, object]:
    return {
        "submission_id": state.submission_id,
        "status": state.status,
        "exit_code": exit_code_of(state) if state.has_ended else None,
        "output": state.output,
        "message": state.message,
    }
