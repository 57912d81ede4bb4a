"""Runs in this process: the product's own code from job file to `_SUCCESS`, without Ray and without child processes.

One worker lives in this process, and the plan is made here, too. For tests whose subject is rows, columns, errors,
answers or reports. Tests of the pool take `local_ray`, tests of signals and of death a process (`echo_jobs`), and tests
of what ends a child process take `without_ray` alone.
"""

import asyncio
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from ready_jobs import ready_job

from segue.pipeline.ledger.manifest import Manifest
from segue.pipeline.ledger.totals import RunSummary
from segue.pipeline.ledger.units import UnitSpec
from segue.pipeline.plan import order, windows
from segue.pipeline.processes import ray_session
from segue.pipeline.processes.limited import ChildDied, LimitedProcess
from segue.pipeline.processes.progress import Say
from segue.pipeline.ready.job import ReadyJob
from segue.pipeline.run import run as runs
from segue.pipeline.run.passes import Passes
from segue.pipeline.run.worker import UnitWorker


def silent(line: str) -> None:
    """What a run says, for tests that do not ask."""


def run(path: str | Path, *overrides: str, say: Say = silent) -> RunSummary:
    """The whole run as `segue run` does it: on the Ray of `local_ray`, or in this process inside `without_ray`."""
    return runs.run_job(ready_job(path, *overrides), say, quiet=True)


def run_here(path: str | Path, *overrides: str, say: Say = silent) -> RunSummary:
    """The whole run in this process."""
    with without_ray(), without_children():
        return run(path, *overrides, say=say)


@contextmanager
def without_ray() -> Iterator[None]:
    """In the block a run needs no Ray, be it a call or a command, however large its plan is."""
    with (
        patch.multiple(
            order, FEW_ROWS=sys.maxsize, FEW_BYTES=sys.maxsize, FEW_PIECES=sys.maxsize, HELD_BYTES=sys.maxsize
        ),
        patch.multiple(
            ray_session,
            ray_session=nullcontext,
            num_cluster_cpus=lambda: 1,
            num_cluster_gpus=lambda: 0.0,
            max_node_cpus=lambda: 1,
            max_node_gpus=lambda: 0.0,
        ),
        patch.object(windows, "PlannerAhead", PlannerHere),
        patch.object(runs, "Passes", PassesHere),
    ):
        yield


class PassesHere(Passes):
    """Units one after the other, in one worker of this process. What is done with receipts is the product's."""

    def _pass(self, units: Sequence[UnitSpec], units_in_flight: int) -> list[UnitSpec]:
        roster = _Roster()
        worker = UnitWorker(self._spec)
        self._interrupt.on_set = lambda: None  # the loop below looks for it
        try:
            for unit in units:
                if roster.is_draining or self._interrupt.is_set:
                    break
                self._take(asyncio.run(worker.receipt(unit)), roster)
        finally:
            assert worker._loop is not None
            worker._loop.stop()
        return self._missing()


class _Roster:
    """Of the actor `segue.pipeline.run.roster.Roster` the one method that receipts lead to."""

    def __init__(self) -> None:
        self.is_draining = False
        self.drain: Any = SimpleNamespace(remote=self._drain)

    def _drain(self) -> None:
        self.is_draining = True


class PlannerHere:
    """In place of `segue.pipeline.plan.windows.PlannerAhead`: plans when it is asked for the result."""

    def __init__(self, job: ReadyJob, before: Manifest) -> None:
        self._job, self._before = job, before

    def wait(self, _: object) -> bool:
        return True

    def result(self) -> Manifest:
        return windows.plan_next(self._job, self._before)

    def close(self) -> None:
        """Nothing goes on."""


@contextmanager
def without_children() -> Iterator[None]:
    """In the block models, prompts and rows are looked at in this process, without limits of time and memory. Starting
    a child takes seconds, as it imports transformers."""
    nothing = lambda *_: None  # noqa: E731
    with patch.multiple(LimitedProcess, begin=nothing, settle=nothing, close=nothing, stream=_streamed_here):
        yield


def _streamed_here(
    _: LimitedProcess, function: Callable[..., Iterator[Any]], *arguments: Any, seconds: float | None = None
) -> Iterator[Any]:
    try:
        for value in function(*arguments):
            yield pickle.loads(pickle.dumps(value))  # as between processes
    except MemoryError:
        raise ChildDied("memory") from None
