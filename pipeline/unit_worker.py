"""What runs in a worker process: units in, shards committed, receipts out.

Several units are in flight at once, over one engine, so that it never idles at a unit's end. Receipts are for counting;
the shard is the commit. A unit that is answered but not committed leaves nothing behind.
"""

import asyncio
import json
import os
import threading
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.progress import Reporter
from pipeline.results import error_value, result_row, result_schema, result_table
from pipeline.shards import PROTOCOL, ShardFooter, commit_shard, serialize_shard
from pipeline.store import Store
from pipeline.units import PASSED, PlannedRow, UnitSpec, load_unit, planned_rows
from workers.echo import EchoEngine, is_echo, seconds_per_step
from workers.loop import EngineLoop, EngineStopped, RowEngine
from workers.request import RequestOutput
from workers.sampling import SamplingParams

DRAIN_SECONDS = 10.0  # how long units in flight may go on once a drain is asked for


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker must know; no secret, no handle."""

    output: str
    fingerprint: str
    source: str  # of the model, or echo
    revision: str | None
    adapter: str | None
    dtype: str
    mask: str
    params: SamplingParams
    has_row_params: bool
    engine: dict[str, Any] = field(default_factory=dict)  # EngineConfig fields
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """A unit's outcome, for counting."""

    ordinal: int
    status: str  # committed | lost (another attempt was first) | drained
    num_rows: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    num_input_tokens: int = 0
    num_computed_tokens: int = 0
    num_generated_tokens: int = 0


class UnitWorker:
    """The class Ray Data runs in each actor of the pool."""

    def __init__(self, spec: WorkerSpec, progress: Any = None) -> None:
        self._spec = spec
        self._store = Store(spec.output)
        self._drain_timer: threading.Timer | None = None
        self._reporter = None
        if progress is not None:
            self._reporter = Reporter(progress, f"{os.getpid()}-{uuid.uuid4().hex[:6]}", self._drain)
        self._loop = EngineLoop(lambda: make_engine(spec), self._reporter)
        # A model that cannot be loaded fails every unit, with its reason; an actor that fails would lose it.
        if self._loop.ready.exception() is None and self._reporter is not None:
            self._reporter.announce(self._loop.ready.result())

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of one unit, as JSON, to its receipt, as JSON."""
        receipts = [await self.run_unit(UnitSpec.from_json(str(text))) for text in batch["unit"]]
        return {"receipt": [json.dumps(asdict(receipt)) for receipt in receipts]}

    async def run_unit(self, unit: UnitSpec) -> Receipt:
        """Answer every row and commit the shard."""
        if self._reporter is not None and self._reporter.is_draining:
            return Receipt(unit.ordinal, "drained")
        table = await asyncio.to_thread(load_unit, self._store, unit)
        rows = list(planned_rows(table, self._spec.params))
        answerable = [(row.segments, row.params, row.random_key) for row in rows if row.error is None]
        try:
            outputs = await asyncio.wrap_future(self._loop.submit(answerable))
        except EngineStopped:
            return Receipt(unit.ordinal, "drained")
        return await asyncio.to_thread(self._commit, unit, table, rows, outputs)

    def _commit(
        self, unit: UnitSpec, table: pa.Table, rows: Sequence[PlannedRow], outputs: Sequence[RequestOutput]
    ) -> Receipt:
        answers = iter(outputs)
        results = [_result(row, None if row.error else next(answers)) for row in rows]
        names = [name for name in table.column_names if name.startswith(PASSED)]
        passed = table.select(names).rename_columns([name.removeprefix(PASSED) for name in names])
        schema = result_schema(passed.schema, self._spec.params, has_row_params=self._spec.has_row_params)
        shard = result_table(schema, passed, results)
        footer = _footer(unit, self._spec.fingerprint, results, outputs)
        content = serialize_shard(shard, footer)
        won = commit_shard(self._store, unit, content, self._spec.fingerprint)
        return Receipt(
            unit.ordinal,
            "committed" if won else "lost",
            unit.num_rows,
            footer.errors,
            footer.num_input_tokens,
            footer.num_computed_tokens,
            footer.num_generated_tokens,
        )

    def _drain(self) -> None:
        self._drain_timer = threading.Timer(DRAIN_SECONDS, self._loop.stop)
        self._drain_timer.daemon = True
        self._drain_timer.start()


def make_engine(spec: WorkerSpec) -> RowEngine:
    """The engine of a job, in the thread that will drive it."""
    mask: Any = spec.mask
    if is_echo(spec.source):
        return EchoEngine(mask, seconds_per_step=seconds_per_step(spec.source))
    import torch

    from workers.engine import Engine

    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    return Engine.from_pretrained(
        spec.source, mask=mask, dtype=spec.dtype, adapter=spec.adapter, revision=spec.revision, **spec.engine
    )


def _result(row: PlannedRow, output: RequestOutput | None) -> dict[str, Any]:
    origin: dict[str, Any] = {"src_path": row.src_path, "src_row": row.src_row}
    if row.error is not None:
        return origin | {"error": error_value(row.error)}
    if output is None:
        raise ValueError("a row without an error was not answered")
    return origin | result_row(output)


def _footer(
    unit: UnitSpec, fingerprint: str, results: Sequence[dict[str, Any]], outputs: Sequence[RequestOutput]
) -> ShardFooter:
    errors = Counter(row["error"]["code"] for row in results if row["error"])
    answered = [output for output in outputs if output.error is None]
    return ShardFooter(
        protocol=PROTOCOL,
        fingerprint=fingerprint,
        unit_id=unit.unit_id,
        num_rows=len(results),
        errors=dict(sorted(errors.items())),
        num_input_tokens=sum(len(output.prompt_token_ids) for output in answered),
        num_computed_tokens=sum(len(output.prompt_token_ids) - output.num_cached_tokens for output in answered),
        num_generated_tokens=sum(len(sample.token_ids) for output in answered for sample in output.outputs),
    )
