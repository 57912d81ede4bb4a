"""A job from a ready configuration to a complete output folder, and what to say about it.

Ray schedules, the store commits: a run can end anywhere and be run again.
"""

import time

from pipeline import cluster
from pipeline.completeness import check_complete, check_unused, missing_units, write_success
from pipeline.interrupt import Interrupt
from pipeline.job import ReadyJob, existing_manifest, today
from pipeline.manifest import SUCCESS, Manifest
from pipeline.passes import Passes, Say, Tally
from pipeline.plan import make_plan, sorted_rows
from pipeline.presence import Presence
from pipeline.summary import RunSummary, committed_footers, count_rows, summary_of


def plan_job(job: ReadyJob, say: Say) -> Manifest:
    """The job's plan: the one in its folder, or a new one. Needs Ray only if there is none."""
    manifest = existing_manifest(job)
    if manifest is not None:
        return manifest
    check_unused(job.store)
    with Interrupt() as interrupt, cluster.ray_session():
        interrupt.install()
        return _plan(job, say)


def run_job(job: ReadyJob, say: Say, *, quiet: bool = False) -> RunSummary:
    """Plan if needed, compute what is missing, check everything, finish with `_SUCCESS`.

    `say(line)` is told what happens. Raises ForeignOutput, ForeignShard, InputChanged, InputUnreadable, WorkersFailed,
    ClusterUnavailable, OutputStorageError; a signal before the first unit raises SystemExit.
    """
    manifest = existing_manifest(job)
    if manifest is None:
        check_unused(job.store)
    elif job.store.exists(SUCCESS):
        check_complete(job.store, manifest)
        job.store.remove_leftovers()  # of a run that died right after its last write
        return summary_of(job, manifest, "already_complete")
    with Interrupt() as interrupt, Presence(job.store, say), cluster.ray_session():
        interrupt.install()  # Ray takes SIGTERM for itself
        manifest = manifest or _plan(job, say)
        started = time.monotonic()
        tally = Tally(*count_rows(committed_footers(job.store, manifest)))
        missing = missing_units(job.store, manifest)
        if len(missing) < len(manifest.units):
            say(f"resuming: {len(manifest.units) - len(missing)} of {len(manifest.units)} shards are there")
        Passes(job, manifest, tally, interrupt, say, quiet=quiet).run()
        seconds = time.monotonic() - started
    return _finish(job, manifest, tally, interrupt, seconds)


def _plan(job: ReadyJob, say: Say) -> Manifest:
    say(f"planning {job.checked.num_rows:,} rows of {len(job.checked.inputs)} files")
    spec = job.render_spec(today())
    manifest = make_plan(job.checked, job.fields, spec, job.store, sorted_rows(job.checked, spec))
    stats = manifest.stats
    say(
        f"planned {manifest.num_rows:,} rows as {len(manifest.units)} units: "
        f"{stats['tokens_requested']:,} prompt tokens requested, {stats['tokens_distinct']:,} distinct"
    )
    return manifest


def _finish(job: ReadyJob, manifest: Manifest, tally: Tally, interrupt: Interrupt, seconds: float) -> RunSummary:
    missing = missing_units(job.store, manifest)
    if not missing:
        write_success(job.store, manifest)
    status, exit_code = "done", 0
    if missing:
        status, exit_code = ("interrupted", interrupt.exit_code) if interrupt.is_set else ("incomplete", 3)
    summary = summary_of(job, manifest, status)
    summary.exit_code = summary.exit_code or exit_code
    summary.rows_this_run, summary.tokens_computed_this_run = tally.rows, tally.computed
    summary.seconds = round(seconds, 2)
    summary.rows_per_second = round(tally.rows / seconds, 2) if seconds else 0.0
    return summary
