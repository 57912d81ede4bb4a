"""A job's plan, window by window: the first in this process, the others ahead of the run, in an actor of Ray's.

A window is planned while those before it are run, so that a dataset is never ordered as a whole. Knows Ray; what a plan
is made of is the business of `pipeline/plan/cutting.py`.
"""

from collections.abc import Generator
from contextlib import closing
from typing import Any

import ray
import ray.exceptions

from segue.pipeline.dataset.blocks import InputChanged, InputUnreadable
from segue.pipeline.ledger.manifest import ForeignOutput, Manifest, load_windows
from segue.pipeline.plan.cutting import plan_window
from segue.pipeline.plan.order import sorted_rows
from segue.pipeline.processes import ray_session
from segue.pipeline.processes.interrupt import Interrupt
from segue.pipeline.processes.limited import LimitedProcess
from segue.pipeline.processes.progress import Say
from segue.pipeline.ready.job import ReadyJob, today
from segue.pipeline.storage.store import OutputStorageError

POLL_SECONDS = 0.5
MAX_DEATHS = 3  # of the process that plans ahead; the next one begins the window anew


def plan_next(job: ReadyJob, before: Manifest | None, child: LimitedProcess | None = None) -> Manifest:
    """The plan with one window more than it had `before`, or the first. `child`: the one that checked the job.

    Raises ForeignOutput, InputChanged, InputUnreadable, WorkersFailed, OutputStorageError.
    """
    spec = job.render_spec(before.date if before else today())
    number = before.num_planned if before else 0
    with closing(sorted_rows(job.checked, spec, number, child)) as rows:
        return plan_window(job.checked, job.fields, spec, job.store, rows, before)


def plan_all(job: ReadyJob, manifest: Manifest | None, say: Say, child: LimitedProcess | None = None) -> Manifest:
    """The whole plan, in this process; `manifest` is what there is of it. `child`: the one that checked the job."""
    if manifest is None:
        manifest = plan_first(job, say, child)
    while not manifest.is_complete:
        manifest = plan_next(job, manifest, child)
        _say_planned(manifest, say)
    return manifest


def plan_first(job: ReadyJob, say: Say, child: LimitedProcess | None = None) -> Manifest:
    """The plan's first window, which is often its only one. `child`: the one that checked the job."""
    num_windows = job.checked.num_windows
    windows = f" in {num_windows} windows (plan.window_rows)" if num_windows > 1 else ""
    say(f"planning {job.checked.num_rows:,} rows of {len(job.checked.inputs)} files{windows}")
    manifest = plan_next(job, None, child)
    _say_planned(manifest, say)
    return manifest


def growing_plans(job: ReadyJob, manifest: Manifest, interrupt: Interrupt, say: Say) -> Generator[Manifest]:
    """What there is of a plan, then the same with more windows, until it is complete or `interrupt` is set.

    While the caller works on one, the next window is planned. Close it to stop that. Raises what `plan_next` does.
    """
    while not manifest.is_complete:
        with closing(PlannerAhead(job, manifest)) as planner:
            yield manifest
            if not planner.wait(interrupt):
                return
            manifest = planner.result()
        _say_planned(manifest, say)
    yield manifest


class PlannerAhead:
    """`plan_next` in an actor of Ray's. To be closed.

    It is no task, since Ray (2.60) ends the driver if a task that is done is cancelled.
    """

    def __init__(self, job: ReadyJob, before: Manifest) -> None:
        self._job = job
        self._before = before
        self._actor: Any = _Planner.remote(job)
        self._ref: Any = self._actor.plan_next.remote(before)

    def wait(self, interrupt: Interrupt) -> bool:
        """Whether it is done; False if a signal came first."""
        interrupt.on_set = lambda: None  # there is nothing to drain
        while not interrupt.is_set:
            if ray.wait([self._ref], timeout=POLL_SECONDS)[0]:
                return True
        return False

    def result(self) -> Manifest:
        """The plan as it is then."""
        try:
            ray.get(self._ref)
        except ray.exceptions.RayError as error:
            failure = ray_session.cause_of(error, ForeignOutput, InputChanged, InputUnreadable, OutputStorageError)
        else:
            return load_windows(self._job.store, self._before)
        raise failure  # without Ray's traceback

    def close(self) -> None:
        """End the actor, whatever it does."""
        ray.kill(self._actor)


@ray.remote(num_cpus=0, max_restarts=MAX_DEATHS, max_task_retries=MAX_DEATHS)
class _Planner:
    def __init__(self, job: ReadyJob) -> None:
        self._job = job
        ray_session.quieten()

    def plan_next(self, before: Manifest) -> None:
        """Plan a window, unless another run or an actor that died has done so."""
        if load_windows(self._job.store, before) == before:
            plan_next(self._job, before)


def _say_planned(manifest: Manifest, say: Say) -> None:
    stats = manifest.stats
    windows = f" of {manifest.num_planned} of {manifest.num_windows} windows" if manifest.num_windows > 1 else ""
    say(
        f"planned {manifest.num_rows:,} rows{windows} as {len(manifest.units)} units: "
        f"{stats['tokens_requested']:,} prompt tokens requested, {stats['tokens_distinct']:,} distinct"
    )
