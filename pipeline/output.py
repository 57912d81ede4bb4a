"""Reading an output folder back: its rows, its errors. Works on a folder that is finished or not, without the job file.

Knows Parquet and the names of shards; no Ray, no model.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from pipeline.manifest import ForeignOutput, load_manifest
from pipeline.store import Store


def shard_paths(output: str) -> list[str]:
    """Committed shards in plan order. Raises ForeignOutput if the folder is no output of Segue."""
    store = Store(output)
    manifest = load_manifest(store)
    if manifest is None:
        raise ForeignOutput(f"{output} is not an output folder of Segue: it has no _job/manifest.json")
    present = set(store.names())
    return [store.path(unit.shard_name) for unit in manifest.units if unit.shard_name in present]


def iter_rows(output: str) -> Iterator[dict[str, Any]]:
    """Result rows in plan order, batch by batch."""
    for path in shard_paths(output):
        with pq.ParquetFile(path, page_checksum_verification=True) as shard:
            for batch in shard.iter_batches():
                yield from batch.to_pylist()


def error_rows(output: str, limit: int) -> list[dict[str, Any]]:
    """The first `limit` rows that have an error: src_path, src_row, code, message."""
    found: list[dict[str, Any]] = []
    for path in shard_paths(output):
        table = pq.read_table(path, columns=["src_path", "src_row", "error"], page_checksum_verification=True)
        rows = table.filter(table["error"].is_valid()).slice(0, limit - len(found)).to_pylist()
        found += [{"src_path": row["src_path"], "src_row": row["src_row"], **row["error"]} for row in rows]
        if len(found) >= limit:
            break
    return found


def error_counts(output: str) -> dict[str, int]:
    """Rows by error code."""
    counts: Counter[str] = Counter()
    for path in shard_paths(output):
        column = pq.read_table(path, columns=["error"], page_checksum_verification=True)["error"]
        counts.update(value["code"] for value in column.drop_null().to_pylist())
    return dict(sorted(counts.items()))
