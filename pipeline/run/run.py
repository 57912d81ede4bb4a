"""A job from a ready configuration to a complete output folder, and what to say about it.

Ray schedules, the store commits: a run can end anywhere and be run again.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress

from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.ledger.completeness import check_complete, check_unused, missing_units, write_success
from segue.pipeline.ledger.manifest import MANIFEST, SUCCESS, Manifest
from segue.pipeline.ledger.presence import Presence
from segue.pipeline.ledger.totals import RunSummary, committed_footers, count_rows, summary_of
from segue.pipeline.plan.order import needs_ray
from segue.pipeline.plan.windows import growing_plans, plan_all, plan_first
from segue.pipeline.problems import ClusterUnavailable
from segue.pipeline.processes import ray_session
from segue.pipeline.processes.interrupt import Interrupt
from segue.pipeline.processes.progress import Say
from segue.pipeline.ready.job import ReadyJob, existing_manifest, today
from segue.pipeline.run.passes import Passes, Tally
from segue.pipeline.storage.open import open_store


def plan_job(job: ReadyJob, say: Say) -> Manifest:
    """The job's whole plan: what is in its folder, and what that lacks. Needs Ray only if that is more than a few
    rows."""
    manifest = existing_manifest(job)
    if manifest is None:
        check_unused(job.store)
    elif manifest.is_complete:
        return manifest
    session = ray_session.ray_session if needs_ray(job.checked, job.render_spec(today())) else nullcontext
    with Interrupt() as interrupt, session():
        interrupt.install()
        return plan_all(job, manifest, say)


@contextmanager
def ray_ahead() -> Iterator[Callable[[JobConfig], None]]:
    """Yields what starts a local Ray for a job that is still being looked at (`meanwhile` of `prepare`), unless its
    output is complete or not empty. It ends with the block, which has `run_job` in it. Starting takes seconds, and
    mostly waits; joining a cluster does not, and may take the folder from under a submitted job (Ray 2.60)."""
    with ExitStack() as stack:

        def start(config: JobConfig) -> None:
            if not ray_session.is_local():
                return
            store = open_store(config.output.path)
            if store.exists(SUCCESS) or (store.data_names() and not store.exists(MANIFEST)):
                return
            interrupt = stack.enter_context(Interrupt())
            with suppress(ClusterUnavailable):  # the run will find that out, if nothing else is wrong
                stack.enter_context(ray_session.ray_session())
            interrupt.install()  # Ray takes SIGTERM for itself

        yield start


def run_job(job: ReadyJob, say: Say, *, quiet: bool = False) -> RunSummary:
    """Plan if needed, compute what is missing, check everything, finish with `_SUCCESS`.

    `say(line)` is told what happens. Raises ForeignOutput, ForeignShard, InputChanged, InputUnreadable, WorkersFailed,
    ClusterUnavailable, OutputStorageError; a signal before the first unit raises SystemExit.
    """
    was_done = job.store.exists(SUCCESS)  # looked for before the plan, which another run may complete meanwhile
    manifest = existing_manifest(job)
    if manifest is None:
        check_unused(job.store)
    elif was_done:
        check_complete(job.store, manifest)
        job.store.remove_leftovers()  # of a run that died right after its last write
        return summary_of(job, manifest, "already_complete")
    with Interrupt() as interrupt, Presence(job.store, say), ray_session.ray_session():
        interrupt.install()  # Ray takes SIGTERM for itself
        manifest = manifest or plan_first(job, say)
        started = time.monotonic()
        tally = Tally(*count_rows(committed_footers(job.store, manifest)))
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
    return _finish(job, manifest, tally, interrupt, seconds)


def _finish(job: ReadyJob, manifest: Manifest, tally: Tally, interrupt: Interrupt, seconds: float) -> RunSummary:
    is_done = manifest.is_complete and not missing_units(job.store, manifest)
    if is_done:
        write_success(job.store, manifest)
    status, exit_code = "done", 0
    if not is_done:
        status, exit_code = ("interrupted", interrupt.exit_code) if interrupt.is_set else ("incomplete", 3)
    summary = summary_of(job, manifest, status)
    summary.exit_code = summary.exit_code or exit_code
    summary.rows_this_run, summary.tokens_computed_this_run = tally.rows, tally.computed
    summary.seconds = round(seconds, 2)
    summary.rows_per_second = round(tally.rows / seconds, 2) if seconds else 0.0
    return summary
