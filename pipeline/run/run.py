"""A run: from a ready job to a complete output folder and a summary.

Ray schedules, the store commits. A run may end at any point and be started again. Knows the order of the steps; each
step is a module of its own.
"""

import time
from collections.abc import Container, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import replace

from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.ledger.completeness import check_complete, check_unused, missing_units, write_success
from segue.pipeline.ledger.manifest import MANIFEST, SUCCESS, Manifest
from segue.pipeline.ledger.presence import Presence
from segue.pipeline.ledger.totals import RunSummary, summary_of, totals_of
from segue.pipeline.plan.order import needs_ray
from segue.pipeline.plan.windows import growing_plans, plan_all, plan_first
from segue.pipeline.problems import ClusterUnavailable
from segue.pipeline.processes import ray_session
from segue.pipeline.processes.address import is_local
from segue.pipeline.processes.interrupt import Interrupt
from segue.pipeline.processes.limited import LimitedProcess
from segue.pipeline.processes.progress import Say
from segue.pipeline.ready.job import ReadyJob, existing_manifest, today
from segue.pipeline.run.passes import Passes
from segue.pipeline.run.tally import Tally
from segue.pipeline.storage.open import open_store


def plan_job(job: ReadyJob, say: Say, child: LimitedProcess | None = None) -> Manifest:
    """The job's whole plan: the windows in its folder, and those that are still missing. Needs Ray only if more than a
    few rows are to be planned. `child`: the one that checked the job, which prepares few rows."""
    manifest = existing_manifest(job)
    if manifest is None:
        check_unused(job.store)
    elif manifest.is_complete:
        return manifest
    session = ray_session.ray_session if needs_ray(job.checked, job.render_spec(today())) else nullcontext
    with Interrupt() as interrupt, session():
        interrupt.install()
        return plan_all(job, manifest, say, child)


@contextmanager
def ray_ahead(config: JobConfig) -> Iterator[None]:
    """A local Ray while the job is still being checked (`meanwhile` of `ready_job`). It ends with the block, in which
    `run_job` is called.

    Ray takes seconds to start, mostly waiting. It is not started if the output is complete or not empty, nor if filters
    read the data first, as Ray would wait for them. Nor is a cluster joined: that is quick, and may take the working
    directory from under a submitted job (Ray 2.60).
    """
    with ExitStack() as stack:
        if is_local() and not config.input.filters and _may_run(config):
            interrupt = stack.enter_context(Interrupt())
            with suppress(ClusterUnavailable):  # the run reports it, if nothing else is wrong
                stack.enter_context(ray_session.ray_session())
            interrupt.install()  # again, since Ray has taken SIGTERM for itself
        yield


def _may_run(config: JobConfig) -> bool:
    """Whether the output is neither complete nor somebody else's."""
    store = open_store(config.output.path)
    return not store.exists(SUCCESS) and (store.exists(MANIFEST) or not store.data_names())


def run_job(job: ReadyJob, say: Say, *, quiet: bool = False, child: LimitedProcess | None = None) -> RunSummary:
    """Plan if needed, compute what is missing, check everything, finish with `_SUCCESS`.

    `say(line)` is called with each event. `child`: the one that checked the job, which prepares the first rows. Raises
    ForeignOutput, ForeignShard, InputChanged, InputUnreadable, WorkersFailed, ClusterUnavailable, OutputStorageError;
    a signal before the first unit raises SystemExit.
    """
    was_done = job.store.exists(SUCCESS)  # before the plan is read, which another run may complete meanwhile
    manifest = existing_manifest(job)
    if manifest is None:
        check_unused(job.store)
    elif was_done:
        check_complete(job.store, manifest)
        job.store.remove_leftovers()  # of a run that died right after its last write
        return _summary_of(job, manifest, "already_complete")
    with Interrupt() as interrupt, Presence(job.store, say), ray_session.ray_session():
        interrupt.install()  # again, since Ray has taken SIGTERM for itself
        manifest = manifest or plan_first(job, say, child)
        started = time.monotonic()
        before = totals_of(job.store, manifest)
        found_by_workers = before.num_errors - before.num_planned_errors
        tally = Tally(job.checked.num_rows, job.config.limits.max_error_rate, before.rows, found_by_workers)
        missing = missing_units(job.store, manifest)
        if len(missing) < len(manifest.units):
            say(f"resuming: {len(manifest.units) - len(missing)} of {len(manifest.units)} shards are there")
        passes = Passes(job, tally, interrupt, say, quiet=quiet)
        with closing(growing_plans(job, manifest, interrupt, say)) as plans:
            for manifest in plans:
                passes.run(manifest)
                if not passes.may_go_on:
                    break
        seconds = time.monotonic() - started
    return _finish(job, manifest, passes.published, tally, interrupt, seconds)


def _finish(
    job: ReadyJob, manifest: Manifest, published: Container[int], tally: Tally, interrupt: Interrupt, seconds: float
) -> RunSummary:
    is_done = manifest.is_complete and not missing_units(job.store, manifest, published)
    if is_done:
        write_success(job.store, manifest)
    status, exit_code = "done", 0
    if not is_done:
        status, exit_code = ("interrupted", interrupt.exit_code) if interrupt.is_set else ("incomplete", 3)
    summary = _summary_of(job, manifest, status, published)
    return replace(
        summary,
        exit_code=summary.exit_code or exit_code,
        reason="" if is_done else tally.reason,
        rows_this_run=tally.rows,
        tokens_computed_this_run=tally.computed,
        seconds=round(seconds, 2),
        rows_per_second=round(tally.rows / seconds, 2) if seconds else 0.0,
    )


def _summary_of(job: ReadyJob, manifest: Manifest, status: str, published: Container[int] = ()) -> RunSummary:
    rate, num_rows = job.config.limits.max_error_rate, job.checked.num_rows
    return summary_of(
        job.config.output.path, manifest, status, num_rows=num_rows, max_error_rate=rate, published=published
    )
