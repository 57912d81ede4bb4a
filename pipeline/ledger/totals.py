"""How much of a job is done, in numbers: the sum over the footers of the committed shards, whichever run wrote them.

Knows the plan and the store; no Ray.
"""

from collections import Counter
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from segue.pipeline.jobfile.schema import MIN_ROWS_FOR_ERROR_RATE
from segue.pipeline.ledger.manifest import Manifest
from segue.pipeline.ledger.shards import ShardFooter, read_footer
from segue.pipeline.ledger.units import UnitSpec
from segue.pipeline.storage.open import open_store
from segue.pipeline.storage.store import Store

READERS = 8  # footers read at once: a small read is latency, not work


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the committed shards of one output."""

    shards: int = 0
    rows: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # rows by error code
    num_planned_errors: int = 0  # those of them that planning found
    num_input_tokens: int = 0  # prompt tokens of answered rows, as requested
    num_computed_tokens: int = 0  # those of them that went through the model
    num_generated_tokens: int = 0

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The result of one run. Totals are of the whole output; `seconds` and names with `this_run` are of this run."""

    status: str  # done | already_complete | interrupted | incomplete | too_many_errors
    output: str
    exit_code: int = 0  # 0 done, 3 incomplete or too many errors, 130 or 143 interrupted
    reason: str = ""  # why errors ended the run
    rows: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # rows by error code
    num_errors: int = 0
    errors_planned: dict[str, int] = field(default_factory=dict)  # those that planning found in the whole plan
    shards: int = 0
    tokens_requested: int = 0  # prompt tokens of all planned rows
    tokens_distinct: int = 0  # those of them that one worker has to compute
    tokens_computed: int = 0
    tokens_generated: int = 0
    share_reused: float = 0.0  # of the requested prompt tokens
    rows_this_run: int = 0
    tokens_computed_this_run: int = 0
    seconds: float = 0.0  # from the plan of the first window on; includes loading the model
    rows_per_second: float = 0.0


def summary_of(
    output: str,
    manifest: Manifest,
    status: str,
    *,
    num_rows: int,
    max_error_rate: float,
    published: Container[int] = (),
) -> RunSummary:
    """The output as it is now. Over the error limit, the status is `too_many_errors` and the exit code 3. `num_rows`:
    of the whole job, planned or not. `published`: as in `missing_units`.

    Raises ForeignShard, OutputStorageError.
    """
    totals = totals_of(open_store(output), manifest, published)
    num_errors = manifest.num_errors + totals.num_errors - totals.num_planned_errors
    is_over = is_over_limit(num_rows, num_errors, max_error_rate)
    requested, computed = totals.num_input_tokens, totals.num_computed_tokens
    return RunSummary(
        status="too_many_errors" if is_over else status,
        output=output,
        exit_code=3 if is_over else 0,
        rows=totals.rows,
        errors=totals.errors,
        num_errors=totals.num_errors,
        errors_planned=manifest.errors,
        shards=totals.shards,
        tokens_requested=manifest.stats["tokens_requested"],
        tokens_distinct=manifest.stats["tokens_distinct"],
        tokens_computed=computed,
        tokens_generated=totals.num_generated_tokens,
        share_reused=round(1 - computed / requested, 4) if requested else 0.0,
    )


def totals_of(store: Store, manifest: Manifest, published: Container[int] = ()) -> Totals:
    """The sums over what is committed now. Raises ForeignShard, OutputStorageError."""
    units = _committed_units(store, manifest, published)
    footers = _footers(store, manifest, units)
    errors: Counter[str] = Counter()
    for footer in footers:
        errors.update(footer.errors)
    return Totals(
        shards=len(footers),
        rows=sum(footer.num_rows for footer in footers),
        errors=dict(sorted(errors.items())),
        num_planned_errors=sum(unit.num_errors for unit in units),
        num_input_tokens=sum(footer.num_input_tokens for footer in footers),
        num_computed_tokens=sum(footer.num_computed_tokens for footer in footers),
        num_generated_tokens=sum(footer.num_generated_tokens for footer in footers),
    )


def committed_footers(store: Store, manifest: Manifest) -> list[ShardFooter]:
    """The footers of all committed shards, in plan order. Raises ForeignShard, OutputStorageError."""
    return _footers(store, manifest, _committed_units(store, manifest))


def _committed_units(store: Store, manifest: Manifest, published: Container[int] = ()) -> list[UnitSpec]:
    present = set(store.names())
    return [
        unit
        for unit in manifest.units
        if unit.shard_name in present or (unit.ordinal in published and store.exists(unit.shard_name))
    ]


def _footers(store: Store, manifest: Manifest, units: Sequence[UnitSpec]) -> list[ShardFooter]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda unit: read_footer(store, unit, manifest.fingerprint), units))


def is_over_limit(num_rows: int, num_errors: int, max_error_rate: float) -> bool:
    """Whether a job of `num_rows` rows has more errors than it may, however its other rows end. Errors come unevenly:
    rows of one unit have the same beginning. So the rate of the rows so far says nothing of the job's."""
    return num_rows >= MIN_ROWS_FOR_ERROR_RATE and num_errors > max_error_rate * num_rows
