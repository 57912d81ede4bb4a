"""Which columns of a Parquet file are encrypted, where its footer is not: read from the footer's own bytes.

pyarrow (26) opens such a file, ends the process if it is asked about an encrypted column, and finds out while it reads
rows. Knows Thrift's compact protocol as far as it must, to find Parquet's `ColumnChunk.crypto_metadata`.
"""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

SIGNATURE_BYTES = 28  # behind the metadata, in a footer that is not encrypted while columns are
_ROW_GROUPS, _COLUMNS, _CRYPTO_METADATA = 4, 1, 8  # fields of FileMetaData, RowGroup and ColumnChunk
_TRUE, _FALSE, _I8, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12


def encrypted_columns(footer: bytes, metadata: pq.FileMetaData, schema: pa.Schema) -> frozenset[str]:
    """The names of columns of which a part is encrypted. `footer`: with its length and magic at the end.

    Raises ValueError.
    """
    if len(footer) - 8 - metadata.serialized_size != SIGNATURE_BYTES:
        return frozenset()
    leaves = [field.name for field in schema for _ in range(_num_leaves(field.type))]
    try:
        numbers = _encrypted_leaves(_Reader(footer))
    except (IndexError, RecursionError) as error:
        raise ValueError("a footer that ends too soon, or is nested too deeply") from error
    return frozenset(leaves[number] for number in numbers if number < len(leaves))


def _num_leaves(kind: pa.DataType) -> int:
    """How many columns Parquet keeps values of this type in."""
    if isinstance(kind, pa.BaseExtensionType):
        return _num_leaves(kind.storage_type)
    if types.is_map(kind):
        return _num_leaves(kind.key_type) + _num_leaves(kind.item_type)
    if not types.is_nested(kind):
        return 1
    return sum(_num_leaves(kind.field(number).type) for number in range(kind.num_fields))


def _encrypted_leaves(reader: "_Reader") -> list[int]:
    """The numbers of the first row group's columns that are encrypted."""
    found: list[int] = []
    for _ in _items_of(reader, _ROW_GROUPS):
        for number, _ in enumerate(_items_of(reader, _COLUMNS)):
            fields = []
            for field, kind in reader.fields():
                fields.append(field)
                reader.skip(kind)
            if _CRYPTO_METADATA in fields:
                found.append(number)
        break
    return found


def _items_of(reader: "_Reader", wanted: int) -> Iterator[None]:
    """Stops before each item of the list that is this field of the struct at hand; the caller reads the item."""
    for field, kind in reader.fields():
        if field != wanted:
            reader.skip(kind)
            continue
        for _ in range(reader.size_of_list()[0]):
            yield


class _Reader:
    """Thrift's compact protocol. What is no Thrift raises IndexError; the caller has had it parsed before."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._place = 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """(number, type) of each field of a struct; the caller reads or skips its value."""
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            yield number, head & 15

    def size_of_list(self) -> tuple[int, int]:
        """(number of items, their type)."""
        head = self._byte()
        return (head >> 4 if head >> 4 < 15 else self._varint()), head & 15

    def skip(self, kind: int, *, is_item: bool = False) -> None:
        """A value of this type. A boolean field is in its own header, a boolean item is a byte."""
        if kind in (_TRUE, _FALSE):
            self._place += is_item
        elif kind == _I8:
            self._place += 1
        elif kind == _DOUBLE:
            self._place += 8
        elif kind == _BINARY:
            size = self._varint()
            self._place += size
        elif kind in (_LIST, _SET):
            size, item = self.size_of_list()
            for _ in range(size):
                self.skip(item, is_item=True)
        elif kind == _MAP:
            self._skip_map()
        elif kind == _STRUCT:
            for _, inner in self.fields():
                self.skip(inner)
        else:
            self._varint()

    def _skip_map(self) -> None:
        size = self._varint()
        kinds = self._byte() if size else 0
        for _ in range(size):
            self.skip(kinds >> 4, is_item=True)
            self.skip(kinds & 15, is_item=True)

    def _byte(self) -> int:
        self._place += 1
        return self._content[self._place - 1]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
