"""A job from a ready configuration to a complete output folder, and what to say about it.

Ray schedules, the store commits: what is missing is always the plan minus the listing, never a count of receipts. So a
run can end anywhere and be run again.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray.exceptions

from pipeline import cluster
from pipeline.interrupt import Interrupt
from pipeline.job import ReadyJob, existing_manifest, today
from pipeline.manifest import SUCCESS, ForeignOutput, Manifest
from pipeline.plan import make_plan
from pipeline.pool import run_units, threads_of
from pipeline.problems import JobRefused, Problem, shown
from pipeline.progress import ProgressActor, ProgressDisplay, Totals
from pipeline.shards import ForeignShard, read_footer
from pipeline.store import OutputStorageError, Store
from pipeline.summary import RunSummary, committed_footers, count_rows, is_over_limit, summary_of
from pipeline.unit_worker import DRAIN_SECONDS, Receipt
from pipeline.units import UnitDamaged, UnitSpec

Say = Callable[[str], None]


@dataclass(slots=True)
class _Tally:
    """Rows so far: those found committed at the start, and receipts of this run."""

    rows_before: int
    errors_before: int
    rows: int = 0
    errors: int = 0
    computed: int = 0

    def add(self, receipt: Receipt) -> None:
        self.rows += receipt.num_rows
        self.computed += receipt.num_computed_tokens
        self.errors += sum(receipt.errors.values())

    def is_over_limit(self, job: ReadyJob) -> bool:
        rows, errors = self.rows_before + self.rows, self.errors_before + self.errors
        return is_over_limit(rows, errors, job.config.limits.max_error_rate)


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
        return summary_of(job, manifest, "already_complete")
    with Interrupt() as interrupt, cluster.ray_session():
        interrupt.install()  # Ray takes SIGTERM for itself
        manifest = manifest or _plan(job, say)
        started = time.monotonic()
        tally = _Tally(*count_rows(committed_footers(job.store, manifest)))
        missing = missing_units(job.store, manifest)
        if len(missing) < len(manifest.units):
            say(f"resuming: {len(manifest.units) - len(missing)} of {len(manifest.units)} shards are there")
        _run_passes(job, manifest, tally, interrupt, say, quiet)
        seconds = time.monotonic() - started
    return _finish(job, manifest, tally, interrupt, seconds)


def check_unused(store: Store) -> None:
    """Raises ForeignOutput if a folder without a manifest holds data: it is somebody's.

    Raises JobRefused for a store in which two writers could both win.
    """
    names = store.data_names()
    if names:
        raise ForeignOutput(
            f"output.path: {store.path('')} is not empty ({names[0]}) and not an output of Segue; "
            "wanted a new or empty folder"
        )
    if not store.is_exclusive():
        wanted = "a store that honours If-None-Match; this one overwrites what is there"
        raise JobRefused([Problem("output.path", shown(store.path("")), wanted)])


def check_complete(store: Store, manifest: Manifest) -> None:
    """Raises OutputStorageError if shards are gone that `_SUCCESS` says were there."""
    gone = missing_units(store, manifest)
    if gone:
        raise OutputStorageError(
            f"{store.path(gone[0].shard_name)} is gone although {store.path(SUCCESS)} says that it was there; "
            f"put it back, or remove {SUCCESS} to compute it again"
        )


def missing_units(store: Store, manifest: Manifest) -> list[UnitSpec]:
    """Plan minus listing. Raises ForeignOutput for a file that looks like data and is not in the plan."""
    present = set(store.data_names())
    strangers = sorted(present - {unit.shard_name for unit in manifest.units})
    if strangers:
        raise ForeignOutput(f"output.path: {store.path(strangers[0])} is not a shard of this job; move it away")
    return [unit for unit in manifest.units if unit.shard_name not in present]


def _plan(job: ReadyJob, say: Say) -> Manifest:
    num_rows = sum(file.num_rows for file in job.checked.inputs)
    limit = job.config.input.limit
    say(f"planning {min(num_rows, limit) if limit is not None else num_rows:,} rows of {len(job.checked.inputs)} files")
    manifest = make_plan(job.checked, job.fields, job.render_spec(today()), job.store)
    stats = manifest.stats
    say(
        f"planned {manifest.num_rows:,} rows as {len(manifest.units)} units: "
        f"{stats['tokens_requested']:,} prompt tokens requested, {stats['tokens_distinct']:,} distinct"
    )
    return manifest


def _run_passes(job: ReadyJob, manifest: Manifest, tally: _Tally, interrupt: Interrupt, say: Say, quiet: bool) -> None:
    """Passes over what is missing, until nothing is, or a pass commits nothing."""
    missing = missing_units(job.store, manifest)
    while missing and not interrupt.is_set and not tally.is_over_limit(job):
        lost = _run_pass(job, manifest, missing, tally, interrupt, say, quiet)
        still = missing_units(job.store, manifest)
        if len(still) == len(missing) and not interrupt.is_set:
            if lost is not None:
                raise lost
            return
        if lost is not None and still and not interrupt.is_set:
            say(f"{lost}; {len(still)} units are missing, trying them again")
        missing = still


def _run_pass(
    job: ReadyJob,
    manifest: Manifest,
    units: Sequence[UnitSpec],
    tally: _Tally,
    interrupt: Interrupt,
    say: Say,
    quiet: bool,
) -> Exception | None:
    """One pass over `units`. Returns why it was lost if processes died; raises what an error in a worker was."""
    progress: Any = ProgressActor.remote()
    interrupt.on_set = threading.Thread(target=_drain, args=(progress, say), daemon=True).start
    num_rows, num_tokens = sum(unit.num_rows for unit in units), sum(unit.num_tokens for unit in units)
    num_requests = None if job.config.task == "generate" else sum(unit.num_requests for unit in units)
    totals = Totals(num_rows, num_tokens, num_requests)
    spec = job.worker_spec(manifest, threads_of(job.config.workers))
    try:
        with ProgressDisplay(progress, totals, quiet=quiet):
            for receipt in run_units(units, job.config.workers, spec, progress):
                tally.add(receipt)
                if tally.is_over_limit(job):
                    progress.drain.remote()
        return None
    except ray.exceptions.RayTaskError as error:
        failure = cluster.cause_of(error, UnitDamaged, OutputStorageError, ForeignShard)
    except ray.exceptions.RayError as error:
        return cluster.cause_of(error)
    # Not chained: Ray's traceback holds its executor, and that holds the workers' CPUs.
    raise failure


def _drain(progress: Any, say: Say) -> None:
    """In a thread: a signal handler may run while Ray holds its locks."""
    progress.drain.remote()
    say(f"interrupted: units in flight have {DRAIN_SECONDS:.0f} s to finish; interrupt again to stop at once")


def _finish(job: ReadyJob, manifest: Manifest, tally: _Tally, interrupt: Interrupt, seconds: float) -> RunSummary:
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


def write_success(store: Store, manifest: Manifest) -> None:
    """The last write: every shard checked against the plan, with its size and checksum."""
    shards = []
    for unit in manifest.units:
        footer = read_footer(store, unit, manifest.fingerprint)
        content = store.read(unit.shard_name)
        digest = hashlib.sha256(content).hexdigest()
        shards.append({"name": unit.shard_name, "rows": footer.num_rows, "bytes": len(content), "sha256": digest})
    record = {"fingerprint": manifest.fingerprint, "rows": manifest.num_rows, "shards": shards}
    store.create(SUCCESS, json.dumps(record, indent=1).encode())
    store.remove_leftovers()
