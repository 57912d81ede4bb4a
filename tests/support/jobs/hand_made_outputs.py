"""Output folders made by hand, shard by shard, without a run. Knows the ledger; no model and no job file."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from segue.pipeline.ledger.columns import result_schema, result_table
from segue.pipeline.ledger.completeness import write_success
from segue.pipeline.ledger.manifest import Manifest
from segue.pipeline.ledger.shards import PROTOCOL, ShardFooter, commit_shard, serialize_shard
from segue.pipeline.ledger.units import UnitSpec
from segue.pipeline.storage.folder import LocalStore
from segue.workers.rows.params import SamplingParams


def output_of(
    folder: Path, shards: Sequence[pa.Table], *, rows: Sequence[Sequence[int]], is_finished: bool = True
) -> Path:
    """An output folder with these passed-through columns. `rows`: the `src_row` of each row of each shard, in the
    shard's order. If it is not finished, it lacks the last shard."""
    store = LocalStore(folder / "out")
    units = tuple(UnitSpec(n, f"{n:016x}", len(numbers), len(numbers), 1) for n, numbers in enumerate(rows))
    manifest = Manifest(PROTOCOL, "job", "2026-01-02", {}, {}, units, {})
    store.create("_job/manifest.json", manifest.to_bytes())
    for unit, passed, numbers in list(zip(units, shards, rows, strict=True))[: None if is_finished else -1]:
        results = [{"src_path": "a", "src_row": number, "generated_text": f"answer {number}"} for number in numbers]
        shard = result_table(result_schema(passed.schema, SamplingParams()), passed, results)
        footer = ShardFooter(PROTOCOL, manifest.fingerprint, unit.unit_id, len(numbers), {}, 0, 0, 0)
        commit_shard(store, unit, serialize_shard(shard, footer), manifest.fingerprint)
    if is_finished:
        write_success(store, manifest)
    return folder / "out"
