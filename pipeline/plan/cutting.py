"""A dataset, or a window of it, to a persisted plan: rows rendered and tokenised, ordered depth-first, cut into units.

The rows come ordered (`pipeline/plan/order.py`) and stream through this one process, which counts the tree and cuts
units. Units are named by their content. A window belongs to the plan once its file exists: the manifest of the first
window, a file of its own for each other. Knows no Ray.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import repeat
from typing import Any

import pyarrow as pa

from segue.attention.segments import num_tokens
from segue.pipeline.ledger.chains import decode_chain, num_chain_tokens
from segue.pipeline.ledger.manifest import (
    MANIFEST,
    ForeignOutput,
    Manifest,
    check_same_job,
    fingerprint,
    load_manifest,
    load_windows,
    versions,
    window_name,
    window_to_bytes,
)
from segue.pipeline.ledger.shards import PROTOCOL
from segue.pipeline.ledger.units import SCORE_FIELD, UnitSpec, score_row, serialize_unit
from segue.pipeline.plan.requests import RequestCounter
from segue.pipeline.plan.tree import TreeCounter
from segue.pipeline.prompts.render import RenderSpec
from segue.pipeline.ready.checks import CheckedJob
from segue.pipeline.storage.store import Store
from segue.workers.scoring.rows import requests_of

ORDER = ["chain", "src_path", "src_row"]  # of a plan's rows: equal prompts stay in the order of the input


def plan_window(
    job: CheckedJob,
    fields: dict[str, Any],
    spec: RenderSpec,
    store: Store,
    rows: Iterable[pa.Table],
    before: Manifest | None,
) -> Manifest:
    """Write the units of `rows`, which come in the plan's order, and then the file that makes them part of the plan.

    `before` is the plan that they are the next window of, None if they are the first. Two planners at once end with one
    plan, which may have more windows than this one. Raises ForeignOutput, OutputStorageError, and what `rows` raises.
    """
    cutter = _UnitCutter(job, spec, store, fingerprint(fields), len(before.units) if before else 0)
    for batch in rows:
        cutter.add(batch)
    units = tuple(cutter.finish())
    stats = asdict(cutter.counter.finish()) | {"errors": dict(sorted(cutter.errors.items()))}
    if before is None:
        return _publish_first(job, fields, spec, store, units, stats)
    name = window_name(before.num_planned)
    store.create(name, window_to_bytes(before, units, stats))
    found = load_windows(store, before)
    if found.num_planned == before.num_planned:
        raise FileNotFoundError(f"{store.path(name)} was written and is not there")
    return found


def _publish_first(
    job: CheckedJob,
    fields: dict[str, Any],
    spec: RenderSpec,
    store: Store,
    units: tuple[UnitSpec, ...],
    stats: dict[str, Any],
) -> Manifest:
    """The manifest that the folder has afterwards, ours or another planner's of the same job. Raises ForeignOutput if
    another job was first."""
    manifest = Manifest(
        protocol=PROTOCOL,
        name=job.config.name,
        date=spec.date,
        fields=fields,
        stats=stats,
        units=units,
        versions=versions(),
        job=job.config.model_dump(mode="json", exclude_unset=True),
        num_windows=job.num_windows,
    )
    store.create(MANIFEST, manifest.to_bytes())
    found = load_manifest(store)
    if found is None:
        raise FileNotFoundError(f"{store.path(MANIFEST)} was written and is not there")
    try:
        check_same_job(found, fields, store.path(""))
    except ForeignOutput:
        for unit in units:  # another job was planned into the folder at the same time; it shares no file with this one
            store.discard(unit.unit_name)
        raise
    return found


class _UnitCutter:
    """Collects sorted rows into units and publishes each as soon as it is full."""

    def __init__(self, job: CheckedJob, spec: RenderSpec, store: Store, fingerprint: str, first_ordinal: int) -> None:
        self.counter = RequestCounter(TreeCounter(job.config.workers.max_size))
        self.errors: Counter[str] = Counter()  # rows by error code
        self._task = spec.task
        self._max_model_len = spec.max_model_len
        self._max_rows = job.config.output.max_rows_per_file
        self._max_bytes = job.config.output.max_bytes_per_file
        self._store = store
        self._fingerprint = fingerprint
        self._passed = job.columns.written
        self._first_ordinal = first_ordinal
        self._units: list[UnitSpec] = []
        self._pieces: list[pa.Table] = []
        self._num_rows = self._num_bytes = self._num_requests = self._num_tokens = 0

    def add(self, batch: pa.Table) -> None:
        """Rows in depth-first order."""
        if not batch.num_rows:
            return  # of no rows Ray's sort makes a table without columns
        row_bytes = max(1, batch.nbytes // batch.num_rows)
        start = 0
        for index, (requests, tokens) in enumerate(self._count(batch)):
            if self._num_rows and (self._num_rows >= self._max_rows or self._num_bytes + row_bytes > self._max_bytes):
                self._pieces.append(batch.slice(start, index - start))
                self._flush()
                start = index
            self._num_rows += 1
            self._num_bytes += row_bytes
            self._num_requests += requests
            self._num_tokens += tokens
        self._pieces.append(batch.slice(start))

    def finish(self) -> list[UnitSpec]:
        self._flush()
        return self._units

    def _count(self, batch: pa.Table) -> Iterator[tuple[int, int]]:
        """Of each row how many requests it has and how many tokens they feed. A row is counted into the tree when the
        next one is asked for: its unit is known then."""
        columns = [batch[name].to_pylist() for name in ORDER]
        # One by one: as Python numbers, a batch of long texts would need gigabytes.
        scores = repeat(None, len(batch)) if self._task == "generate" else (v.as_py() for v in batch[SCORE_FIELD.name])
        for chain, src_path, src_row, value in zip(*columns, scores, strict=True):
            row = f"{src_path}:{src_row}"
            if value is None:
                yield int(bool(chain)), num_chain_tokens(chain)
                self.counter.add(chain, row)
            else:
                requests = requests_of(score_row(decode_chain(chain), value), self._task, self._max_model_len)
                yield len(requests), sum(num_tokens(request.fed_segments) for request in requests)
                self.counter.add_scored(chain, requests, row)

    def _flush(self) -> None:
        if not self._num_rows:
            return
        table = pa.concat_tables(self._pieces).combine_chunks()
        unit_id, content = serialize_unit(table, self._fingerprint, self._passed)
        codes = table["error"].drop_null().to_pylist()
        self.errors.update(error["code"] for error in codes)
        ordinal = self._first_ordinal + len(self._units)
        unit = UnitSpec(ordinal, unit_id, self._num_rows, self._num_requests, self._num_tokens, len(codes))
        self._store.create(unit.unit_name, content)
        self._units.append(unit)
        self._pieces, self._num_rows, self._num_bytes, self._num_requests, self._num_tokens = [], 0, 0, 0, 0
        self.counter.end_unit()
