"""A run in numbers, from the footers of what is committed, whoever committed it.

Knows the plan and the store; no Ray.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from segue.pipeline.jobfile.schema import MIN_ROWS_FOR_ERROR_RATE
from segue.pipeline.ledger.manifest import Manifest
from segue.pipeline.ledger.shards import ShardFooter, read_footer
from segue.pipeline.ready.job import ReadyJob
from segue.pipeline.storage.store import Store

READERS = 8  # of footers: latency, not work


@dataclass(slots=True)
class RunSummary:
    """Totals are of the whole output, `seconds` and what has `this_run` in its name of this call."""

    status: str  # done | already_complete | interrupted | incomplete | too_many_errors
    output: str
    exit_code: int = 0  # 0 done, 3 incomplete or too many errors, 130 or 143 interrupted
    rows: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # rows by code
    num_errors: int = 0
    shards: int = 0
    tokens_requested: int = 0  # prompt tokens of all planned rows
    tokens_distinct: int = 0  # what one worker has to compute of them
    tokens_computed: int = 0
    tokens_generated: int = 0
    share_reused: float = 0.0  # of the requested prompt tokens
    rows_this_run: int = 0
    tokens_computed_this_run: int = 0
    seconds: float = 0.0  # from the first window's plan on, model loading included
    rows_per_second: float = 0.0


def summary_of(job: ReadyJob, manifest: Manifest, status: str) -> RunSummary:
    """The output as it is now; over the error limit, `status` and exit code say so."""
    footers = committed_footers(job.store, manifest)
    errors: Counter[str] = Counter()
    for footer in footers:
        errors.update(footer.errors)
    requested = sum(footer.num_input_tokens for footer in footers)
    computed = sum(footer.num_computed_tokens for footer in footers)
    rows, num_errors = count_rows(footers)
    is_over = is_over_limit(rows, num_errors, job.config.limits.max_error_rate)
    return RunSummary(
        status="too_many_errors" if is_over else status,
        output=job.config.output.path,
        exit_code=3 if is_over else 0,
        rows=rows,
        errors=dict(sorted(errors.items())),
        num_errors=num_errors,
        shards=len(footers),
        tokens_requested=manifest.stats["tokens_requested"],
        tokens_distinct=manifest.stats["tokens_distinct"],
        tokens_computed=computed,
        tokens_generated=sum(footer.num_generated_tokens for footer in footers),
        share_reused=round(1 - computed / requested, 4) if requested else 0.0,
    )


def committed_footers(store: Store, manifest: Manifest) -> list[ShardFooter]:
    """In plan order. Raises ForeignShard."""
    present = set(store.names())
    units = [unit for unit in manifest.units if unit.shard_name in present]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda unit: read_footer(store, unit, manifest.fingerprint), units))


def count_rows(footers: Sequence[ShardFooter]) -> tuple[int, int]:
    """(rows, rows with an error)"""
    return sum(footer.num_rows for footer in footers), sum(sum(footer.errors.values()) for footer in footers)


def is_over_limit(rows: int, num_errors: int, max_error_rate: float) -> bool:
    """Whether a run should stop: only once there are enough rows to tell."""
    return rows >= MIN_ROWS_FOR_ERROR_RATE and num_errors > max_error_rate * rows
