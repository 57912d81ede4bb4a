"""A worker: takes units, answers their rows with one engine, commits shards, hands back receipts.

Several units are in flight at once, so that the engine never idles at the end of a unit. A unit that is answered but
not committed leaves nothing behind. An error of the storage or the plan goes into the receipt. After an error inside
the engine the process ends, since the engine's state cannot be trusted. Knows units and the engine; no pool.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

import pyarrow as pa

from segue.pipeline.ledger.columns import (
    Split,
    error_value,
    result_row,
    result_schema,
    result_table,
    score_values,
)
from segue.pipeline.ledger.shards import PROTOCOL, ShardFooter, commit_shard, serialize_shard
from segue.pipeline.ledger.units import PlannedRow, UnitSpec, load_unit, passed_columns, planned_rows
from segue.pipeline.processes.metrics import EngineMetrics, label_of
from segue.pipeline.ready.worker_spec import WorkerSpec
from segue.pipeline.run.receipt import Receipt
from segue.pipeline.run.roster import Reporter
from segue.pipeline.storage.models import local_source
from segue.pipeline.storage.open import open_store
from segue.workers.engine.echo import EchoEngine
from segue.workers.engine.loop import EngineLoop, EngineRow, EngineStopped, RowEngine
from segue.workers.errors import RowError
from segue.workers.models.echo import is_echo
from segue.workers.prompts.reasoning import ReasoningSplitter
from segue.workers.rows.request import GenerationRequest, RequestOutput
from segue.workers.scoring.rows import requests_of
from segue.workers.scoring.template import Task


class UnitWorker:
    """The class Ray Data runs in each actor of the pool."""

    def __init__(self, spec: WorkerSpec, roster: Any = None) -> None:
        """`roster`: the actor to report to; None for a worker in the caller's own process."""
        self._spec = spec
        self._store = open_store(spec.output)
        self._reporter: Reporter | None = None
        self._loop: EngineLoop | None = None  # None: it drains before it has loaded anything
        if roster is None:
            self._loop = EngineLoop(lambda: make_engine(spec))
        else:
            metrics = EngineMetrics(label_of(spec.name, spec.fingerprint))
            self._reporter = Reporter(roster, self._drain, metrics)
            self._load(self._reporter)

    def _load(self, reporter: Reporter) -> None:
        reporter.announce()
        if reporter.is_draining:
            return
        self._loop = EngineLoop(lambda: make_engine(self._spec), reporter)
        error = self._loop.ready.exception()
        if error is not None:
            reporter.end_process(error, while_loading=True)
        reporter.announce_loaded(self._loop.ready.result())

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of one unit as JSON to its receipt as JSON. Raises nothing: Ray Data would drop the unit."""
        receipts = [await self.receipt(UnitSpec.from_json(str(text))) for text in batch["unit"]]
        return {"receipt": [receipt.to_json() for receipt in receipts]}

    async def receipt(self, unit: UnitSpec, convicted: Mapping[int, RowError] | None = None) -> Receipt:
        """The receipt of `run_unit`, also if it fails."""
        try:
            return await self.run_unit(unit, convicted)
        except Exception as error:
            return Receipt.of_failure(unit.ordinal, error)

    async def run_unit(self, unit: UnitSpec, convicted: Mapping[int, RowError] | None = None) -> Receipt:
        """Answer every row and commit the shard. `convicted` rows, by their place in the unit, get their error instead.

        Raises UnitDamaged, ForeignShard, OutputStorageError.
        """
        if self._is_draining:
            return Receipt(unit.ordinal, "drained")
        table = await asyncio.to_thread(load_unit, self._store, unit)
        rows = list(planned_rows(table, self._spec.params))
        for place, error in (convicted or {}).items():
            rows[place] = replace(rows[place], error=error)
        answers = await self._answers(rows)
        if answers is None:
            return Receipt(unit.ordinal, "drained")
        return await asyncio.to_thread(self._commit, unit, table, rows, answers)

    async def try_rows(self, unit: UnitSpec, places: Sequence[int]) -> bool:
        """Answer these rows only to see whether the process survives. False if it was drained. Raises UnitDamaged."""
        if self._is_draining:
            return False
        table = await asyncio.to_thread(load_unit, self._store, unit)
        rows = list(planned_rows(table, self._spec.params))
        return await self._answers([rows[place] for place in places]) is not None

    @property
    def _is_draining(self) -> bool:
        return self._reporter is not None and self._reporter.is_draining

    async def _answers(self, rows: Sequence[PlannedRow]) -> list[list[RequestOutput]] | None:
        """The outputs of each row's requests; None if the engine was stopped before."""
        if self._loop is None:
            return None
        requests = [self._requests(row) for row in rows]
        try:
            outputs = await asyncio.wrap_future(self._loop.submit([request for own in requests for request in own]))
        except EngineStopped:
            return None
        except Exception as error:
            if self._reporter is not None:
                self._reporter.end_process(error, while_loading=False)
            raise
        each = iter(outputs)
        return [list(islice(each, len(own))) for own in requests]

    def _requests(self, row: PlannedRow) -> Sequence[EngineRow]:
        """The requests of a row; none if the row has an error already."""
        if row.error is not None:
            return ()
        if row.score is not None:
            return requests_of(row.score, self._spec.task, self._spec.max_model_len)
        return (GenerationRequest(row.segments, row.params, row.random_key),)

    def _commit(
        self, unit: UnitSpec, table: pa.Table, rows: Sequence[PlannedRow], answers: Sequence[Sequence[RequestOutput]]
    ) -> Receipt:
        split, spec, passed = self._split, self._spec, passed_columns(table)
        results = [_result(row, spec.task, outputs, split) for row, outputs in zip(rows, answers, strict=True)]
        schema = result_schema(
            passed.schema,
            spec.params,
            spec.task,
            has_row_params=spec.has_row_params,
            has_reasoning=split is not None,
        )
        shard = result_table(schema, passed, results)
        footer = _footer(unit, self._spec.fingerprint, results, [output for own in answers for output in own])
        content = serialize_shard(shard, footer)
        won = commit_shard(self._store, unit, content, self._spec.fingerprint)
        return Receipt(
            unit.ordinal,
            "committed" if won else "lost",
            unit.num_rows,
            footer.errors,
            unit.num_errors,
            footer.num_input_tokens,
            footer.num_computed_tokens,
            footer.num_generated_tokens,
        )

    @cached_property
    def _split(self) -> Split | None:
        """Takes the reasoning out of an answer, if the job wants that."""
        spec = self._spec
        if spec.reasoning is None:
            return None
        splitter = ReasoningSplitter.of_model(local_source(spec.source), spec.revision, spec.reasoning)
        return lambda output, sample: splitter.split(output.prompt_token_ids, sample.token_ids, sample.text)

    def _drain(self) -> None:
        if self._loop is not None:
            timer = threading.Timer(self._spec.drain_timeout_s, self._loop.stop)
            timer.daemon = True
            timer.start()


def make_engine(spec: WorkerSpec) -> RowEngine:
    """The engine of a job. Call it in the thread that will run the engine."""
    if is_echo(spec.source):
        return EchoEngine.from_source(spec.source)
    import torch

    from segue.workers.engine.engine import Engine

    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    options: dict[str, Any] = {"mask": spec.mask, "max_model_len": spec.max_model_len, **spec.engine}
    source, adapter = local_source(spec.source), spec.adapter and local_source(spec.adapter)
    return Engine.from_pretrained(
        source,
        dtype=spec.dtype,
        adapter=adapter,
        check_adapter=False,
        revision=spec.revision,
        device=spec.device,
        device_map=spec.device_map,
        quantization=spec.quantization,
        **options,
    )


def _result(row: PlannedRow, task: Task, outputs: Sequence[RequestOutput], split: Split | None) -> dict[str, Any]:
    origin: dict[str, Any] = {"src_path": row.src_path, "src_row": row.src_row}
    if row.error is not None:
        return origin | {"error": error_value(row.error)}
    if not outputs:
        raise ValueError("a row without an error was not answered")
    if row.score is not None:
        return origin | score_values(row.score, task, outputs)
    return origin | result_row(outputs[0], split) | {"num_truncated_tokens": row.num_truncated_tokens}


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
        num_input_tokens=sum(output.num_prompt_tokens for output in answered),
        num_computed_tokens=sum(output.num_prompt_tokens - output.num_cached_tokens for output in answered),
        num_generated_tokens=sum(len(sample.token_ids) for output in answered for sample in output.outputs),
        finished=round(time.time(), 3),
    )
