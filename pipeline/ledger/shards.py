"""A shard of the output: made in memory, checked, published once. Publishing the shard commits its unit.

Knows Parquet and the store; no model, no Ray.
"""

import io
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from segue.pipeline.ledger.carried import as_schema, serialized, without_views
from segue.pipeline.ledger.units import MAX_READS, UnitSpec
from segue.pipeline.storage.store import OutputStorageError, Store

PROTOCOL = 1
FOOTER_KEY = b"segue"


class ForeignShard(ValueError):
    """A file has the name of a shard and is not that shard."""


class ShardDamaged(OutputStorageError):
    """A shard does not hold what was written."""


@dataclass(frozen=True, slots=True)
class ShardFooter:
    """What a shard says of itself."""

    protocol: int
    fingerprint: str
    unit_id: str
    num_rows: int
    errors: dict[str, int]  # rows by error code
    num_input_tokens: int  # prompt tokens of answered rows, as requested
    num_computed_tokens: int  # those of them that went through the model
    num_generated_tokens: int
    finished: float = 0.0  # seconds since 1970, by the worker's clock; 0 if unknown


def serialize_shard(table: pa.Table, footer: ShardFooter) -> bytes:
    """The whole file. It is read back and checked: a shard with missing rows or another schema is never published.

    Raises ValueError.
    """
    text = json.dumps({name: getattr(footer, name) for name in ShardFooter.__slots__})
    content = _parquet(table.replace_schema_metadata({FOOTER_KEY: text}))
    read = pq.read_table(io.BytesIO(content), page_checksum_verification=True)
    if read.num_rows != footer.num_rows or not read.schema.equals(table.schema):
        raise ValueError(f"a shard read back as {read.num_rows} rows, wanted {footer.num_rows} in the same schema")
    return content


def _parquet(table: pa.Table) -> bytes:
    """Views are written as plain strings, below a schema that says what they are: pyarrow (26) cannot write all of
    them, and reads them so."""
    sink, metadata = io.BytesIO(), dict(table.schema.metadata)
    plain = pa.schema([field.with_type(without_views(field.type)) for field in table.schema], metadata)
    has_views = plain != table.schema
    if has_views:
        metadata[b"ARROW:schema"] = serialized(table.schema)
        table = as_schema(table, plain)
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True, "store_schema": not has_views}
    with pq.ParquetWriter(sink, plain, **options) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(metadata)
    return sink.getvalue()


def commit_shard(store: Store, unit: UnitSpec, content: bytes, fingerprint: str) -> bool:
    """Publish a shard; False if another attempt has published it before. Raises ForeignShard, OutputStorageError."""
    if store.create(unit.shard_name, content):
        return True
    read_footer(store, unit, fingerprint)
    return False


def read_footer(store: Store, unit: UnitSpec, fingerprint: str) -> ShardFooter:
    """The footer of a committed shard. Raises ForeignShard if it is not the whole shard of this job and unit.

    Raises OutputStorageError.
    """
    path = store.path(unit.shard_name)
    try:
        with store.open(unit.shard_name) as file:
            metadata = pq.read_metadata(file)
    except ValueError as error:  # ArrowInvalid is one
        raise ForeignShard(f"{path} is not a shard of Segue: {error}") from error
    except OSError as error:
        raise OutputStorageError(f"{path}: {error.strerror or error}") from error
    return parse_footer(metadata, unit, fingerprint, path)


def read_shard(store: Store, unit: UnitSpec, fingerprint: str) -> tuple[ShardFooter, bytes]:
    """The footer and the content of a committed shard, with every page checked.

    A shard that looks damaged is read again, since a byte may have flipped on the way. Raises ForeignShard,
    ShardDamaged, OutputStorageError.
    """
    path = store.path(unit.shard_name)
    found: Exception = ShardDamaged(f"{path} was not read")
    for _ in range(MAX_READS):
        content = store.read(unit.shard_name)
        try:
            return check_shard(content, unit, fingerprint, path), content
        except (ForeignShard, ShardDamaged) as error:
            found = error
    raise found


def check_shard(content: bytes, unit: UnitSpec, fingerprint: str, path: str) -> ShardFooter:
    """The footer of a shard, after every page was checked. `path` is its name in errors.

    Raises ForeignShard if it is a shard of another job or unit, ShardDamaged if it is not a whole Parquet file.
    """
    try:
        with pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True) as file:
            footer = parse_footer(file.metadata, unit, fingerprint, path)
            for _ in file.iter_batches():
                pass  # reading checks each page
    except ForeignShard:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ShardDamaged(f"{path} is not a whole Parquet file any more: {error}") from error
    return footer


def parse_footer(metadata: pq.FileMetaData, unit: UnitSpec, fingerprint: str, path: str) -> ShardFooter:
    """The footer in a file's metadata. `path` is the file's name in errors. Raises ForeignShard."""
    try:
        footer = ShardFooter(**json.loads((metadata.metadata or {})[FOOTER_KEY]))
    except (KeyError, TypeError, ValueError) as error:
        raise ForeignShard(f"{path} is not a shard of Segue: {error}") from error
    wanted = (PROTOCOL, fingerprint, unit.unit_id, unit.num_rows)
    got = (footer.protocol, footer.fingerprint, footer.unit_id, footer.num_rows)
    if got != wanted or metadata.num_rows != unit.num_rows:
        raise ForeignShard(f"{path} is a shard of another job or unit: got {got}, wanted {wanted}")
    return footer
