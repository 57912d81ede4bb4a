"""Passed-through columns on their way through pickles, sorts and the plan's files, which do not take every Arrow type.

A column travels as its *carrier*, a type of the same values that all of these take, and becomes what it was when its
shard is written. Pickles forget which list items may not be null and whether a map is sorted (pyarrow 26), views cannot
be sorted, and of two fields with one name in a struct one gets lost. Knows Arrow; no rows, no storage.
"""

import base64
from collections.abc import Sequence

import pyarrow as pa
from pyarrow import types

PASSED_TYPES = b"segue.passed"  # key in a table's metadata: what its columns will become again
_EXTENSION = b"ARROW:extension:"  # keys of a field whose extension type is not known here
_REFUSED = (
    types.is_union,
    types.is_run_end_encoded,
    types.is_interval,
    types.is_list_view,
    types.is_large_list_view,
)


def carrier(kind: pa.DataType) -> pa.DataType | None:
    """The type as which values of `kind` travel; None if they cannot."""
    if any(is_refused(kind) for is_refused in _REFUSED):
        return None
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return pa.large_string() if types.is_string_view(kind) else pa.large_binary()
    if isinstance(kind, pa.BaseExtensionType):
        return carrier(kind.storage_type)
    if types.is_dictionary(kind):
        return kind if carrier(kind.value_type) == kind.value_type and not types.is_nested(kind.value_type) else None
    if types.is_nested(kind):
        inner = [carrier(field.type) for field in _fields(kind)]
        return None if None in inner else _nested(kind, inner)
    return kind


def carried_schema(schema: pa.Schema) -> pa.Schema:
    """Plain fields of the carriers. All types have one."""
    return pa.schema([pa.field(field.name, carrier(field.type)) for field in schema])


def extension_of(field: pa.Field) -> dict[bytes, bytes]:
    """A field's metadata that says of which extension type it is."""
    return {key: value for key, value in (field.metadata or {}).items() if key.startswith(_EXTENSION)}


def remembered(schema: pa.Schema) -> dict[bytes, bytes]:
    """Metadata for a table of carriers, from which `restored` learns the types of `schema`; empty if these are they."""
    if all(field.equals(pa.field(field.name, carrier(field.type)), check_metadata=True) for field in schema):
        return {}
    return {PASSED_TYPES: serialized(schema)}


def serialized(schema: pa.Schema) -> bytes:
    """A schema as text, as Arrow puts it into Parquet's metadata."""
    return base64.b64encode(schema.serialize().to_pybytes())


def restored(table: pa.Table, metadata: dict[bytes, bytes] | None) -> pa.Table:
    """A table of carriers with the types that `remembered` put into `metadata`."""
    text = (metadata or {}).get(PASSED_TYPES)
    return table if text is None else as_schema(table, pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text))))


def as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table's columns, one by one, as the types of another schema."""
    columns = [
        pa.chunked_array([converted(chunk, field.type) for chunk in column.chunks], field.type)
        for column, field in zip(table.columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def without_views(kind: pa.DataType) -> pa.DataType:
    """The type with plain strings and bytes for views, and otherwise the same."""
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return pa.large_string() if types.is_string_view(kind) else pa.large_binary()
    if isinstance(kind, pa.BaseExtensionType):
        storage = without_views(kind.storage_type)
        return kind if storage == kind.storage_type else storage
    if not types.is_nested(kind):
        return kind
    inner = [field.with_type(without_views(field.type)) for field in _fields(kind)]
    if types.is_map(kind):
        return pa.map_(*inner, keys_sorted=kind.keys_sorted)
    if types.is_struct(kind):
        return pa.struct(inner)
    if types.is_fixed_size_list(kind):
        return pa.list_(inner[0], kind.list_size)
    return pa.large_list(inner[0]) if types.is_large_list(kind) else pa.list_(inner[0])


def converted(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The same values as another type: a carrier, the type that it carries, or a type that holds more values."""
    if array.type.equals(kind, check_metadata=True):
        return array
    if types.is_null(array.type):
        empty = pa.nulls(len(array), carrier(kind))
        return empty if empty.type == kind else converted(empty, kind)
    if isinstance(array, pa.ExtensionArray):
        return converted(array.storage, kind)
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, converted(array, kind.storage_type))
    if not types.is_nested(kind):
        return array.cast(kind)
    if array.type.id != kind.id:  # a list of another kind
        array = array.cast(_nested(kind, [field.type for field in _fields(array.type)]))
    inner = [
        converted(child, field.type) if field.nullable else _without_nulls(converted(child, field.type))
        for child, field in zip(_children(array), _fields(kind), strict=True)
    ]
    return _rebuilt(array, kind, inner, has_nulls=True)


def _without_nulls(array: pa.Array) -> pa.Array:
    """What lies below the nulls of a parent, where the type says that there is none: any value will do."""
    kind = array.type
    if not array.null_count:
        return array
    if isinstance(array, pa.ExtensionArray):
        return pa.ExtensionArray.from_storage(kind, _without_nulls(array.storage))
    if isinstance(array, pa.DictionaryArray):
        any_value = pa.array([b""]).cast(kind.value_type)
        values = array.dictionary if len(array.dictionary) else any_value
        return pa.DictionaryArray.from_arrays(array.indices.fill_null(0), values, ordered=kind.ordered)
    if types.is_nested(kind):
        return _rebuilt(array, kind, _children(array), has_nulls=False)
    return pa.Array.from_buffers(kind, len(array), [None, *array.buffers()[1:]], 0, array.offset)


def _rebuilt(array: pa.Array, kind: pa.DataType, inner: list[pa.Array], *, has_nulls: bool) -> pa.Array:
    """A nested array as another type of the same layout, with other children."""
    if isinstance(array, pa.StructArray):
        mask = array.is_null() if has_nulls else None
        return pa.StructArray.from_arrays(inner, fields=_fields(kind), mask=mask)
    if isinstance(array, pa.MapArray):
        inner = [pa.StructArray.from_arrays(inner, fields=_fields(kind))]
    buffers = array.buffers()[: 1 if isinstance(array, pa.FixedSizeListArray) else 2]
    if not has_nulls:
        buffers[0] = None
    return pa.Array.from_buffers(kind, len(array), buffers, -1 if has_nulls else 0, array.offset, inner)


def _children(array: pa.Array) -> list[pa.Array]:
    """Of a struct its fields; of a list or map all values below it, also those before its own first one."""
    if isinstance(array, pa.StructArray):
        return [array.field(number) for number in range(array.type.num_fields)]
    return [array.keys, array.items] if isinstance(array, pa.MapArray) else [array.values]


def _fields(kind: pa.DataType) -> list[pa.Field]:
    """Of the values inside."""
    if types.is_map(kind):
        return [kind.key_field, kind.item_field]
    return [kind.field(number) for number in range(kind.num_fields)]


def _nested(kind: pa.DataType, inner: Sequence[pa.DataType]) -> pa.DataType:
    """A list, map or struct of the same kind with these types inside, any of which may be null."""
    if types.is_map(kind):
        return pa.map_(*inner)
    if types.is_struct(kind):
        names = [field.name for field in kind]
        names = names if len(set(names)) == len(names) else [str(number) for number in range(len(names))]
        return pa.struct(list(zip(names, inner, strict=True)))
    if types.is_fixed_size_list(kind):
        return pa.list_(inner[0], kind.list_size)
    return pa.large_list(inner[0]) if types.is_large_list(kind) else pa.list_(inner[0])
