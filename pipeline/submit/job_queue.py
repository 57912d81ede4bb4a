"""A cluster's queue of jobs: submit, follow, stop, through Ray's Jobs API, over HTTP alone.

The cluster runs `segue run` or `segue finetune`. The output folder says what is done, so a command that Ray or
Kubernetes starts again goes on where it stopped. Knows Ray's Jobs API; nothing of planning or running.
"""

import asyncio
import ipaddress
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from segue.pipeline.problems import ClusterUnavailable, first_and_last_line, shown
from segue.pipeline.processes.ray_session import REQUIRE_AUTH
from segue.pipeline.submit.submission import JOB_FILE, SubmittedJob, copied_package

ADDRESS = "RAY_API_SERVER_ADDRESS"  # environment variable, which Ray's client (2.60) prefers to its argument
MAX_ATTEMPTS = 1000  # of one job on one cluster
NO_AGENT = "No available agent"  # message of Ray (2.60): nothing was submitted
FAR_SECONDS = 120.0  # a cluster that does not answer is tried for so long
ASK_SECONDS = 1.0
QUIET_SECONDS = 60.0
STOP_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class JobState:
    """The state of a submission on its cluster."""

    submission_id: str
    status: str  # PENDING | RUNNING | SUCCEEDED | FAILED | STOPPED
    exit_code: int | None  # of its command, once it has ended by itself
    output: str | None
    message: str

    @property
    def has_ended(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class JobQueue:
    """A cluster's queue of jobs. Every method raises ClusterUnavailable if the cluster cannot be reached or refuses."""

    def __init__(self, address: str) -> None:
        """`address` is http://HOST:PORT of the dashboard. The token comes from the same places as Ray's own:
        RAY_AUTH_TOKEN, or the file in RAY_AUTH_TOKEN_PATH."""
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClusterUnavailable(f"--address: got {shown(address)}, wanted http://HOST:PORT, usually port 8265")
        if parts.username or parts.password:
            raise ClusterUnavailable("--address: wanted a URL without credentials; a token goes into RAY_AUTH_TOKEN")
        self.address = address
        token = _token()
        self.warnings = tuple(_warnings_of(parts.scheme, parts.hostname, has_token=token is not None))
        os.environ[ADDRESS] = address
        logging.getLogger("ray").setLevel(logging.WARNING)  # uploads and connections
        with self._errors_named():
            from ray.job_submission import JobSubmissionClient

            logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
            self._client = JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)

    def submit(self, job: SubmittedJob, runtime_env: Mapping[str, Any], *, with_code: bool) -> tuple[str, bool]:
        """(submission id, whether it is new). A job that is at work already is not started again.

        `with_code`: send this installation's code with the job; else the cluster uses its own.
        """
        with self._errors_named(), tempfile.TemporaryDirectory(prefix="segue-") as folder:
            submission_id, is_new = self._free_id(job)
            if not is_new:
                return submission_id, False
            env = dict(runtime_env)
            if with_code:
                env["py_modules"] = [*env.get("py_modules", ()), copied_package(Path(folder) / "code")]
            work = Path(folder) / "job"
            work.mkdir()
            (work / JOB_FILE).write_bytes(job.content)
            self._when_ready(
                lambda: self._client.submit_job(
                    entrypoint=f"python -m segue.jobs.cli {job.command} {JOB_FILE}",
                    submission_id=submission_id,
                    runtime_env=env | {"working_dir": str(work)},
                    metadata=job.metadata,
                )
            )
            return submission_id, True

    def _when_ready(self, hand_over: Callable[[], object]) -> None:
        """Submit, and try again while the agent that starts jobs is not ready: a new head answers before its agent."""
        until = time.monotonic() + FAR_SECONDS
        while True:
            try:
                hand_over()
                return
            except RuntimeError as error:
                if NO_AGENT not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(ASK_SECONDS)

    def _free_id(self, job: SubmittedJob) -> tuple[str, bool]:
        taken = {each.submission_id: each.status for each in self._client.list_jobs()}
        for attempt in range(1, MAX_ATTEMPTS + 1):
            submission_id = job.submission_id + (f"-{attempt}" if attempt > 1 else "")
            if submission_id not in taken:
                return submission_id, True
            if not taken[submission_id].is_terminal():
                return submission_id, False
        raise ClusterUnavailable(f"{job.submission_id}: submitted {MAX_ATTEMPTS:,} times already")

    def state(self, submission_id: str) -> JobState:
        with self._errors_named():
            found = self._client.get_job_info(submission_id)
        return JobState(
            submission_id,
            found.status.value,
            found.driver_exit_code,
            (found.metadata or {}).get("segue_output"),
            first_and_last_line(found.message or ""),
        )

    def logs(self, submission_id: str) -> str:
        """The job's whole log so far."""
        with self._errors_named():
            return self._client.get_job_logs(submission_id)

    def follow(self, submission_id: str, say: Callable[[str], None]) -> JobState:
        """Give `say` each whole line of the job's log until the job has ended. A broken connection is made again, and
        no line comes twice. Raises ClusterUnavailable if the cluster is away for two minutes; the job may go on."""
        self.state(submission_id)  # refuses an unknown one at once
        import aiohttp

        lines = LogLines(say)
        last_heard = time.monotonic()
        while True:
            before = lines.num_chars
            try:
                asyncio.run(self._tail(submission_id, lines))
                state = self.state(submission_id)
                last_heard = time.monotonic()
                if state.has_ended:
                    lines.take_all(self.logs(submission_id))
                    lines.flush()
                    return state
            except (ClusterUnavailable, OSError, RuntimeError, aiohttp.ClientError) as error:
                if lines.num_chars > before:
                    last_heard = time.monotonic()
                if time.monotonic() - last_heard > FAR_SECONDS:
                    raise ClusterUnavailable(f"{self.address}: {first_and_last_line(str(error))}") from None
            time.sleep(ASK_SECONDS)

    async def _tail(self, submission_id: str, lines: "LogLines") -> None:
        """Read the log until it ends, or until it is silent for so long that the connection may be dead."""
        num_chars, texts = 0, aiter(self._client.tail_job_logs(submission_id))
        with suppress(StopAsyncIteration, TimeoutError):
            while True:
                text = await asyncio.wait_for(anext(texts), QUIET_SECONDS)
                lines.take(num_chars, text)
                num_chars += len(text)

    def cancel(self, submission_id: str) -> JobState:
        """Stop a job and wait until it has ended. A job that has ended already stays as it is."""
        with self._errors_named():
            self._client.stop_job(submission_id)
        until = time.monotonic() + STOP_SECONDS
        while not (state := self.state(submission_id)).has_ended and time.monotonic() < until:
            time.sleep(ASK_SECONDS / 2)
        return state

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Turns the errors of the client and its libraries into ClusterUnavailable, which names the address."""
        import ray.exceptions
        import requests

        try:
            yield
        except ray.exceptions.AuthenticationError as error:
            got = "another token" if "Forbidden" in str(error) else "no token"
            hint = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with mode 0600"
            raise ClusterUnavailable(f"{self.address}: got {got}, wanted the cluster's ({hint})") from None
        except (ConnectionError, RuntimeError, ValueError, requests.RequestException) as error:
            raise ClusterUnavailable(f"{self.address}: {first_and_last_line(str(error))}") from None


class LogLines:
    """A log as whole lines. Its text comes in pieces, and any beginning may come again."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._rest = ""
        self.num_chars = 0

    def take(self, start: int, text: str) -> None:
        """Take `text`, which begins at character `start` of the log."""
        new = text[max(0, self.num_chars - start) :]
        self.num_chars += len(new)
        *whole, self._rest = (self._rest + new).split("\n")
        for line in whole:
            self._say(line)

    def take_all(self, text: str) -> None:
        self.take(0, text)

    def flush(self) -> None:
        if self._rest:
            self._say(self._rest)
            self._rest = ""


def last_json(lines: Sequence[str]) -> dict[str, Any] | None:
    """The JSON object that a command of Segue prints last; None if there is none."""
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                return None
    return None


def _token() -> str | None:
    """The token, from the places where Ray looks. Ray (2.60) itself looks only if RAY_AUTH_MODE was set before it was
    imported.

    Raises ClusterUnavailable for a file that cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        if not named:
            return None
        raise ClusterUnavailable(f"RAY_AUTH_TOKEN_PATH: {first_and_last_line(str(error))}") from None


def _warnings_of(scheme: str, host: str, *, has_token: bool) -> Iterator[str]:
    """Warnings about the token. Raises ClusterUnavailable if one is required and missing."""
    if not has_token:
        if os.environ.get(REQUIRE_AUTH) == "1":
            raise ClusterUnavailable(f"no token, and {REQUIRE_AUTH}=1: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH")
        yield "no token (RAY_AUTH_TOKEN): whoever reaches a cluster that asks for none can run code on it"
    elif scheme == "http" and not _is_this_machine(host):
        yield f"the token goes to {host} over http, where others can read it: use https, or a tunnel to localhost"


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
