"""An output folder read back: its rows and its errors. The folder may be finished or not; no job file is needed.

Knows Parquet and the names of shards; no Ray, no model.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from segue.pipeline.ledger.columns import ANY_RESULT_COLUMN
from segue.pipeline.ledger.manifest import SUCCESS, ForeignOutput, Manifest, load_manifest
from segue.pipeline.ledger.units import load_unit
from segue.pipeline.storage.open import open_store
from segue.pipeline.storage.store import OutputStorageError, Store
from segue.workers.scoring.template import Task


def _shards(output: str) -> Iterator["_Shard"]:
    """Committed shards in plan order. Raises ForeignOutput if it is not an output folder of Segue."""
    store, manifest = open_store(output), manifest_of(output)
    present = set(store.names())
    yield from (_Shard(store, unit.shard_name) for unit in manifest.units if unit.shard_name in present)


def task_of(output: str) -> Task:
    """The task of the folder's job. Raises ForeignOutput."""
    return manifest_of(output).task


def manifest_of(output: str) -> Manifest:
    """The manifest of a folder, finished or not. Raises ForeignOutput if it is not an output folder of Segue."""
    manifest = load_manifest(open_store(output))
    if manifest is None:
        raise ForeignOutput(f"{output} is not an output folder of Segue: it has no _job/manifest.json")
    return manifest


def finished_manifest(output: str) -> Manifest:
    """The manifest of a complete output folder. Raises ForeignOutput if it is not complete, or not one of Segue."""
    manifest = manifest_of(output)
    if not (manifest.is_complete and open_store(output).exists(SUCCESS)):
        raise ForeignOutput(
            f"{output} is not complete: it lacks {SUCCESS} or a part of its plan; run its job again to finish it"
        )
    return manifest


def read_columns(output: str, choose: Callable[[pa.Schema], Sequence[str]]) -> Iterator[pa.Table]:
    """The chosen columns of each shard, in plan order. `choose` gets the shard's schema and names the columns that it
    wants; a name that the shard lacks is left out."""
    for shard in _shards(output):
        schema = shard.schema
        yield shard.read([name for name in dict.fromkeys(choose(schema)) if name in schema.names])


def sample_rows(output: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows chosen at random, in plan order: their text columns and results. Reads only shards that hold one.

    Bytes that are not UTF-8 become U+FFFD: a row with BAD_UTF8 holds them as they were in the input.
    """
    shards = list(_shards(output))
    sizes = [shard.num_rows for shard in shards]
    chosen = sorted(random.Random(seed).sample(range(sum(sizes)), min(count, sum(sizes))))
    rows: list[dict[str, Any]] = []
    start = 0
    for shard, size in zip(shards, sizes, strict=True):
        inside = [number - start for number in chosen if start <= number < start + size]
        if inside:
            rows += _shown_rows(shard.read(shard.shown_columns), inside)
        start += size
    return rows


def _shown_rows(table: pa.Table, numbers: Sequence[int]) -> list[dict[str, Any]]:
    columns: dict[str, list[Any]] = {}
    for field in table.schema:
        column = table[field.name]
        if _is_text(field.type):
            texts = column.cast(pa.large_string()).cast(pa.large_binary()).take(numbers).to_pylist()
            columns[field.name] = [None if text is None else text.decode("utf-8", "replace") for text in texts]
        else:
            columns[field.name] = column.take(numbers).to_pylist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _is_text(kind: pa.DataType) -> bool:
    """Whether values are strings, directly or in a dictionary."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def error_rows(output: str, limit: int) -> list[dict[str, Any]]:
    """The first `limit` rows with an error, in answers and in the plan: src_path, src_row, code, message."""
    found: list[dict[str, Any]] = []
    for table in _errors(output):
        rows = table.filter(table["error"].is_valid()).slice(0, limit - len(found)).to_pylist()
        found += [{"src_path": row["src_path"], "src_row": row["src_row"], **row["error"]} for row in rows]
        if len(found) >= limit:
            break
    return found


def error_counts(output: str) -> dict[str, int]:
    """The number of rows with each error code, in answers and in the plan."""
    counts: Counter[str] = Counter()
    for table in _errors(output):
        counts.update(value["code"] for value in table["error"].drop_null().to_pylist())
    return dict(sorted(counts.items()))


def _errors(output: str) -> Iterator[pa.Table]:
    """src_path, src_row and error of each unit's rows, in plan order: of its shard or, where there is none yet, of its
    plan if planning found errors."""
    store, manifest = open_store(output), manifest_of(output)
    present = set(store.names())
    columns = ["src_path", "src_row", "error"]
    for unit in manifest.units:
        if unit.shard_name in present:
            yield _Shard(store, unit.shard_name).read(columns)
        elif unit.num_errors:
            yield load_unit(store, unit).select(columns)


@dataclass(frozen=True, slots=True)
class _Shard:
    """A committed shard. Every method raises OutputStorageError if it cannot be read."""

    store: Store
    name: str

    @property
    def num_rows(self) -> int:
        with self._opened() as file:
            return file.metadata.num_rows

    @property
    def schema(self) -> pa.Schema:
        with self._opened() as file:
            return file.schema_arrow

    @property
    def shown_columns(self) -> list[str]:
        """Results, and texts of the input."""
        return [field.name for field in self.schema if field.name in ANY_RESULT_COLUMN or _is_text(field.type)]

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        with self._opened() as file:
            return file.read(columns=columns)

    @contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        try:
            with self.store.open(self.name) as file:
                yield pq.ParquetFile(file, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise OutputStorageError(f"{self.store.path(self.name)} cannot be read: {error}") from error
