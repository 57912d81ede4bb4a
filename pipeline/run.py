"""A job from a ready configuration to a complete output folder, and what to say about it.

Ray schedules, the store commits: what is missing is always the plan minus the listing, never a count of receipts. So a run
can end anywhere and be run again.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy

from pipeline import cluster
from pipeline.interrupt import Interrupt
from pipeline.job import ReadyJob, existing_manifest, today
from pipeline.manifest import SUCCESS, ForeignOutput, Manifest
from pipeline.plan import make_plan
from pipeline.progress import ProgressActor, ProgressDisplay, Totals
from pipeline.shards import ShardFooter, read_footer
from pipeline.store import OutputStorageError, Store
from pipeline.unit_worker import Receipt, UnitWorker
from pipeline.units import UnitSpec

MAX_TASK_RETRIES = 3  # a unit is tried four times, then the run stops
MIN_ROWS_FOR_ERROR_RATE = 1000


class WorkersFailed(RuntimeError):
    """The workers cannot do the work; the message has the first cause."""


@dataclass(slots=True)
class RunSummary:
    """The run in numbers; totals are of the whole output, `seconds` and `rows_this_run` of this call."""

    status: str  # done | already_complete | interrupted | incomplete | too_many_errors
    output: str
    exit_code: int = 0  # 0 done, 3 incomplete or too many errors, 130 or 143 interrupted
    rows: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # rows by code
    shards: int = 0
    tokens_requested: int = 0  # prompt tokens of all planned rows
    tokens_distinct: int = 0  # what one worker has to compute of them
    tokens_computed: int = 0
    tokens_generated: int = 0
    share_reused: float = 0.0  # of the requested prompt tokens
    rows_this_run: int = 0
    tokens_computed_this_run: int = 0
    seconds: float = 0.0
    rows_per_second: float = 0.0  # of this run, model loading left out

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())


@dataclass(slots=True)
class _Tally:
    """Receipts of this run."""

    rows: int = 0
    computed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    drained: int = 0

    def add(self, receipt: Receipt) -> None:
        self.drained += receipt.status == "drained"
        self.rows += receipt.num_rows
        self.computed += receipt.num_computed_tokens
        self.errors.update(receipt.errors)


def plan_job(job: ReadyJob, say: Any) -> Manifest:
    """The job's plan: the one in its folder, or a new one. Needs Ray only if there is none."""
    manifest = existing_manifest(job)
    if manifest is not None:
        return manifest
    check_unused(job.store)
    with cluster.ray_session():
        return _plan(job, say)


def run_job(job: ReadyJob, say: Any, *, quiet: bool = False) -> RunSummary:
    """Plan if needed, compute what is missing, check everything, finish with `_SUCCESS`.

    `say(line)` is told what happens. Raises ForeignOutput, WorkersFailed, OutputStorageError.
    """
    manifest = existing_manifest(job)
    if manifest is None:
        check_unused(job.store)
    elif job.store.exists(SUCCESS):
        return _summary(job, manifest, "already_complete")
    with Interrupt() as interrupt, cluster.ray_session():
        interrupt.install()  # Ray takes SIGTERM for itself
        manifest = manifest or _plan(job, say)
        started = time.monotonic()
        tally = _Tally()
        missing = missing_units(job.store, manifest)
        if len(missing) < len(manifest.units):
            say(f"resuming: {len(manifest.units) - len(missing)} of {len(manifest.units)} shards are there")
        while missing and not interrupt.is_set and not _has_too_many_errors(job, tally):
            _run_units(job, manifest, missing, tally, interrupt, quiet)
            still = missing_units(job.store, manifest)
            if len(still) == len(missing):
                break
            missing = still
        seconds = time.monotonic() - started
    return _finish(job, manifest, missing_units(job.store, manifest), tally, interrupt, seconds)


def check_unused(store: Store) -> None:
    """Raises ForeignOutput if a folder without a manifest holds files: they are somebody's."""
    names = [name for name in store.names() if not name.startswith((".", "_"))]
    if names:
        raise ForeignOutput(f"output.path: {store.path('')} is not empty ({names[0]}) and not an output of Segue")


def missing_units(store: Store, manifest: Manifest) -> list[UnitSpec]:
    """Plan minus listing. Raises ForeignOutput for a file that looks like data and is not in the plan."""
    present = {name for name in store.names() if not name.startswith((".", "_"))}
    strangers = sorted(present - {unit.shard_name for unit in manifest.units})
    if strangers:
        raise ForeignOutput(f"{store.path(strangers[0])} is not a shard of this job; move it away")
    return [unit for unit in manifest.units if unit.shard_name not in present]


def _plan(job: ReadyJob, say: Any) -> Manifest:
    say(f"planning {sum(file.num_rows for file in job.checked.inputs):,} rows of {len(job.checked.inputs)} files")
    spec = job.render_spec(today())
    manifest = make_plan(job.checked, job.fields, spec, job.store, lambda rows: None)
    stats = manifest.stats
    say(
        f"planned {manifest.num_rows:,} rows as {len(manifest.units)} units: {stats['tokens_requested']:,} prompt tokens "
        f"requested, {stats['tokens_distinct']:,} distinct"
    )
    return manifest


def _run_units(
    job: ReadyJob, manifest: Manifest, units: Sequence[UnitSpec], tally: _Tally, interrupt: Interrupt, quiet: bool
) -> None:
    """One pass over `units`. A pass that loses some is followed by another; one that fails raises WorkersFailed."""
    progress: Any = ProgressActor.remote()
    interrupt.on_set = lambda: progress.drain.remote()
    totals = Totals(sum(unit.num_rows for unit in units), sum(unit.num_tokens for unit in units))
    try:
        with ProgressDisplay(progress, totals, quiet=quiet):
            for receipt in _receipts(job, manifest, units, progress):
                tally.add(receipt)
                if _has_too_many_errors(job, tally):
                    progress.drain.remote()
    except ray.exceptions.RayError as error:
        raise _cause(error) from error


def _receipts(job: ReadyJob, manifest: Manifest, units: Sequence[UnitSpec], progress: Any) -> Iterator[Receipt]:
    """Units through the actor pool, in plan order as far as Ray keeps it."""
    workers = job.config.workers
    threads = workers.threads or max(1, cluster.num_cluster_cpus() // workers.max_size)
    spec = job.worker_spec(manifest, threads)
    pool = ActorPoolStrategy(
        min_size=min(workers.min_size, len(units)),
        max_size=min(workers.max_size, len(units)),
        max_tasks_in_flight_per_actor=workers.units_in_flight,
        max_concurrent_calls_per_actor=workers.units_in_flight,
    )
    rows = ray.data.from_items([{"unit": unit.to_json()} for unit in units], override_num_blocks=len(units))
    receipts = rows.map_batches(
        UnitWorker,
        batch_size=1,
        compute=pool,
        fn_constructor_args=(spec, progress),
        num_cpus=threads,
        max_restarts=-1,
        max_task_retries=MAX_TASK_RETRIES,
    )
    for batch in receipts.iter_batches(batch_size=1, prefetch_batches=0):
        yield Receipt(**json.loads(str(batch["receipt"][0])))


def _cause(error: BaseException) -> Exception:
    """The first cause, as what it is: storage errors keep their kind."""
    inner: BaseException = error
    while isinstance(inner, ray.exceptions.RayTaskError) and isinstance(inner.cause, BaseException):
        inner = inner.cause
    if isinstance(inner, OutputStorageError):
        return inner
    return WorkersFailed(f"{type(inner).__name__}: {inner}")


def _has_too_many_errors(job: ReadyJob, tally: _Tally) -> bool:
    errors = sum(tally.errors.values())
    return tally.rows >= MIN_ROWS_FOR_ERROR_RATE and errors > job.config.limits.max_error_rate * tally.rows


def _finish(
    job: ReadyJob, manifest: Manifest, missing: Sequence[UnitSpec], tally: _Tally, interrupt: Interrupt, seconds: float
) -> RunSummary:
    status, exit_code = "done", 0
    if missing:
        status, exit_code = ("interrupted", interrupt.exit_code) if interrupt.is_set else ("incomplete", 3)
    if _has_too_many_errors(job, tally):
        status, exit_code = "too_many_errors", 3
    if not missing:
        write_success(job.store, manifest)
    summary = _summary(job, manifest, status)
    summary.exit_code = exit_code
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
    store.remove_temporaries()


def _summary(job: ReadyJob, manifest: Manifest, status: str) -> RunSummary:
    footers = _committed(job.store, manifest)
    errors: Counter[str] = Counter()
    for footer in footers:
        errors.update(footer.errors)
    requested = sum(footer.num_input_tokens for footer in footers)
    computed = sum(footer.num_computed_tokens for footer in footers)
    return RunSummary(
        status=status,
        output=job.config.output.path,
        rows=sum(footer.num_rows for footer in footers),
        errors=dict(errors),
        shards=len(footers),
        tokens_requested=manifest.stats["tokens_requested"],
        tokens_distinct=manifest.stats["tokens_distinct"],
        tokens_computed=computed,
        tokens_generated=sum(footer.num_generated_tokens for footer in footers),
        share_reused=round(1 - computed / requested, 4) if requested else 0.0,
    )


def _committed(store: Store, manifest: Manifest) -> list[ShardFooter]:
    present = set(store.names())
    return [read_footer(store, unit, manifest.fingerprint) for unit in manifest.units if unit.shard_name in present]
