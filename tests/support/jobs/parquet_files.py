"""Small Parquet files for tests of the input."""

import base64
import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.parquet import encryption


def write_numbered(path: Path, num_rows: int = 2, *, row_group_size: int | None = None) -> Path:
    """Rows whose `body` has the name of their file and their number, and whose `n` is that number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"body": [f"{path.stem}-{i}" for i in range(num_rows)], "n": list(range(num_rows))})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def typed_table(labels: str = "pq") -> pa.Table:
    """Five rows of types that are easily lost on the way; files of a job have dictionaries of their own."""
    label = (
        pa.array([labels[0], labels[1], None, labels[0], "r"])
        .dictionary_encode()
        .cast(pa.dictionary(pa.int8(), pa.string()))
    )
    day = datetime.date(2024, 2, 29)
    return pa.table(
        {
            "label": label,
            "labels": pa.StructArray.from_arrays([label, label], ["first", "second"]),
            "at": pa.array([1, -1, None, 2**60, 1_700_000_000_000_000_001], pa.timestamp("ns", "UTC")),
            "price": pa.array([Decimal("1.20"), None, Decimal("-0.01"), None, Decimal("9.99")], pa.decimal128(20, 2)),
            "day": [day, None, day, day, day],
            "score": [float("inf"), -0.0, None, 1e-300, 0.1],
            "big": pa.array([2**63 - 1, -(2**63), None, 0, 1], pa.int64()),
            "raw": pa.array([b"\xff\x00", None, b"", b"a", b"b"], pa.large_binary()),
            "tags": [["a", None], [], None, ["b"], ["c"]],
            "nested": [{"x": 1, "y": {"z": "s"}}, None, {"x": None, "y": None}, {"x": 2, "y": {"z": None}}, None],
            "nothing": pa.nulls(5),
        }
    )


class _Kms(encryption.KmsClient):
    """Keeps no secret: a wrapped key is the key."""

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
        return base64.b64decode(wrapped_key)


def write_encrypted(path: Path, table: pa.Table, columns: list[str]) -> None:
    """These leaf columns are encrypted, the footer is not."""
    factory = encryption.CryptoFactory(lambda _: _Kms())
    wanted = encryption.EncryptionConfiguration(footer_key="f", column_keys={"c": columns}, plaintext_footer=True)
    keys = factory.file_encryption_properties(encryption.KmsConnectionConfig(), wanted)
    with pq.ParquetWriter(path, table.schema, encryption_properties=keys) as writer:
        writer.write_table(table)
