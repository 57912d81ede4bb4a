"""Reading an output folder back: its rows, its errors. Works on a folder that is finished or not, without the job file.

Knows Parquet and the names of shards; no Ray, no model.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.manifest import SUCCESS, ForeignOutput, Manifest, load_manifest
from pipeline.results import ANY_RESULT_COLUMN
from pipeline.schemas import is_text
from pipeline.store import OutputStorageError, Store
from workers.scoring import Task


def shard_paths(output: str) -> list[str]:
    """Committed shards in plan order. Raises ForeignOutput if the folder is no output of Segue."""
    store, manifest = Store(output), _manifest_of(output)
    present = set(store.names())
    return [store.path(unit.shard_name) for unit in manifest.units if unit.shard_name in present]


def task_of(output: str) -> Task:
    """What the folder's job does. Raises ForeignOutput."""
    return _manifest_of(output).fields.get("task", "generate")


def finished_manifest(output: str) -> Manifest:
    """What a complete output folder belongs to. Raises ForeignOutput if it is not complete, or none of Segue's."""
    manifest = _manifest_of(output)
    if not Store(output).exists(SUCCESS):
        raise ForeignOutput(f"{output} is not complete: it has no {SUCCESS}; run its job again to finish it")
    return manifest


def read_columns(output: str, choose: Callable[[pa.Schema], Sequence[str]]) -> Iterator[pa.Table]:
    """Each shard's columns among those that `choose` names, given the shard's schema; in plan order."""
    for path in shard_paths(output):
        schema = _schema(path)
        yield _read(path, [name for name in dict.fromkeys(choose(schema)) if name in schema.names])


def sample_rows(output: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows chosen at random, in plan order: their text columns and results. Reads only shards that have one.

    Bytes that are not UTF-8 become U+FFFD: a row with BAD_UTF8 passes them through as they are.
    """
    paths = shard_paths(output)
    sizes = [_metadata(path).num_rows for path in paths]
    chosen = sorted(random.Random(seed).sample(range(sum(sizes)), min(count, sum(sizes))))
    rows: list[dict[str, Any]] = []
    start = 0
    for path, size in zip(paths, sizes, strict=True):
        inside = [number - start for number in chosen if start <= number < start + size]
        if inside:
            rows += _shown_rows(_read(path).take(inside))
        start += size
    return rows


def _shown_rows(table: pa.Table) -> list[dict[str, Any]]:
    columns: dict[str, list[Any]] = {}
    for field in table.schema:
        column = table[field.name]
        if is_text(field.type) and not pa.types.is_null(field.type):
            texts = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
            columns[field.name] = [None if text is None else text.decode("utf-8", "replace") for text in texts]
        elif field.name in ANY_RESULT_COLUMN:
            columns[field.name] = column.to_pylist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def error_rows(output: str, limit: int) -> list[dict[str, Any]]:
    """The first `limit` rows that have an error: src_path, src_row, code, message."""
    found: list[dict[str, Any]] = []
    for path in shard_paths(output):
        table = _read(path, ["src_path", "src_row", "error"])
        rows = table.filter(table["error"].is_valid()).slice(0, limit - len(found)).to_pylist()
        found += [{"src_path": row["src_path"], "src_row": row["src_row"], **row["error"]} for row in rows]
        if len(found) >= limit:
            break
    return found


def error_counts(output: str) -> dict[str, int]:
    """Rows by error code."""
    counts: Counter[str] = Counter()
    for path in shard_paths(output):
        column = _read(path, ["error"])["error"]
        counts.update(value["code"] for value in column.drop_null().to_pylist())
    return dict(sorted(counts.items()))


def _manifest_of(output: str) -> Manifest:
    manifest = load_manifest(Store(output))
    if manifest is None:
        raise ForeignOutput(f"{output} is not an output folder of Segue: it has no _job/manifest.json")
    return manifest


def _read(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A shard. Raises OutputStorageError if it cannot be read."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as shard:
            return shard.read(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise OutputStorageError(f"{path} cannot be read: {error}") from error


def _schema(path: str) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise OutputStorageError(f"{path} cannot be read: {error}") from error


def _metadata(path: str) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise OutputStorageError(f"{path} cannot be read: {error}") from error
