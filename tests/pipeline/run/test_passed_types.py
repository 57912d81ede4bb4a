"""Columns that are only passed through: of every Arrow type, bit-equal in the output, or refused by name."""

import base64
import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo_jobs import shards_in, write_job
from in_process import run_here
from ready_jobs import refusal

from segue.pipeline.ledger.carried import carried_schema, carrier, converted, remembered, restored, without_views
from segue.pipeline.ledger.reading import sample_rows

NO_TEXT = "string of bytes that are no text"
DAY = datetime.date(2024, 2, 29)
LONG = "longer than the twelve bytes that a view holds itself"


def required(kind: pa.DataType, name: str = "item") -> pa.Field:
    return pa.field(name, kind, nullable=False)


def dictionary_of(*values: Any, index: pa.DataType, kind: pa.DataType, ordered: bool = False) -> pa.Array:
    found = pa.array(values, kind).dictionary_encode()
    return pa.DictionaryArray.from_arrays(found.indices.cast(index), found.dictionary, ordered=ordered)


def repeated_fields() -> pa.Array:
    fields = [pa.field("a", pa.int8()), pa.field("a", pa.string())]
    return pa.StructArray.from_arrays([pa.array([1, 2, 3], pa.int8()), pa.array(["x", None, "z"])], fields=fields)


def required_field() -> pa.Array:
    kinds = [pa.int8(), pa.string(), pa.struct([required(pa.int16(), "deep")]), pa.list_(pa.int8())]
    fields = [required(kind, "abcd"[number]) for number, kind in enumerate(kinds)]
    deep = pa.StructArray.from_arrays([pa.array([1, 2, 3], pa.int16())], fields=list(kinds[2]))
    values = [pa.array([1, 2, 3], pa.int8()), pa.array(["x", "y", "z"]), deep, pa.array([[1], [], [2]], kinds[3])]
    return pa.StructArray.from_arrays(values, fields=fields, mask=pa.array([False, True, False]))


def of_storage(kind: Any, values: list[Any]) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))


UUIDS = [b"0123456789abcdef", None, b"\0" * 16]
NESTED_VIEW = pa.list_(pa.struct([("a", pa.list_(pa.string_view())), ("b", pa.binary_view())]))
COLUMNS: dict[str, pa.Array] = {
    "null": pa.nulls(3),
    "bool": pa.array([True, None, False]),
    **{
        str(kind): pa.array([np.iinfo(kind.to_pandas_dtype()).min, None, np.iinfo(kind.to_pandas_dtype()).max], kind)
        for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
    },
    "float16": pa.array(np.array([1.5, np.nan, -0.0], np.float16)),
    "float32": pa.array([float("nan"), -0.0, None], pa.float32()),
    "float64": pa.array([float("inf"), 5e-324, None]),
    "date32": pa.array([DAY, None, DAY]),
    "date64": pa.array([DAY, None, DAY], pa.date64()),
    "time32[s]": pa.array([1, None, 3], pa.time32("s")),
    "time32[ms]": pa.array([1, None, 86_399_999], pa.time32("ms")),
    "time64[us]": pa.array([1, None, 3], pa.time64("us")),
    "time64[ns]": pa.array([1, None, 86_399_999_999_999], pa.time64("ns")),
    **{f"timestamp[{unit}]": pa.array([1, None, -(2**40)], pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")},
    "timestamp with a zone": pa.array([1, None, 2**62], pa.timestamp("ns", "Europe/Berlin")),
    "timestamp with an offset": pa.array([1, None, 2], pa.timestamp("us", "+05:30")),
    **{f"duration[{unit}]": pa.array([1, None, -(2**62)], pa.duration(unit)) for unit in ("s", "ms", "us", "ns")},
    "decimal32": pa.array([Decimal("1.10"), None, Decimal("-0.01")], pa.decimal32(7, 2)),
    "decimal64": pa.array([Decimal("1.10"), None, Decimal("-0.01")], pa.decimal64(17, 2)),
    "decimal128": pa.array([Decimal(10) ** 34, None, Decimal("-0.001")], pa.decimal128(38, 3)),
    "decimal256": pa.array([Decimal(10) ** 60, None, Decimal("-0.001")], pa.decimal256(70, 3)),
    "string": pa.array(["a", None, ""]),
    NO_TEXT: pa.array([b"\xff", None, b""], pa.binary()).view(pa.string()),
    "large_string": pa.array(["a", None, LONG], pa.large_string()),
    "string_view": pa.array(["a", None, LONG], pa.string_view()),
    "binary": pa.array([b"\xff\0", None, b""], pa.binary()),
    "large_binary": pa.array([b"\xff\0", None, b""], pa.large_binary()),
    "binary_view": pa.array([b"\xff\0", None, LONG.encode()], pa.binary_view()),
    "fixed_size_binary": pa.array([b"abcd", None, b"\0\0\0\0"], pa.binary(4)),
    "list": pa.array([[1, None], None, []], pa.list_(pa.int8())),
    "list with a name for its items": pa.array([["x"], None, []], pa.list_(pa.field("element", pa.string()))),
    "list not null": pa.array([[1, 2], None, []], pa.list_(required(pa.int8()))),
    "large_list": pa.array([["a", None], None, []], pa.large_list(pa.string())),
    "list of views": pa.array([["a", None], None, [LONG]], pa.list_(pa.string_view())),
    "large_list of views, not null": pa.array([["a"], None, [LONG]], pa.large_list(required(pa.binary_view()))),
    "views, deep": pa.array([[{"a": ["x", LONG], "b": b"\xff"}], None, [None]], NESTED_VIEW),
    "fixed_size_list": pa.array([[1, 2], None, [3, None]], pa.list_(pa.float32(), 2)),
    "fixed_size_list not null": pa.array([[1, 2], None, [3, 4]], pa.list_(required(pa.float32()), 2)),
    "fixed_size_list of views": pa.array([["a", LONG], None, [None, ""]], pa.list_(pa.string_view(), 2)),
    "list of fixed_size_list not null": pa.array([[[1, 2]], None, []], pa.list_(pa.list_(required(pa.int8()), 2))),
    "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": None}]),
    "struct not null": required_field(),
    "struct of views": pa.array([{"a": LONG}, None, {"a": None}], pa.struct({"a": pa.string_view()})),
    "struct with a repeated field": repeated_fields(),
    "map": pa.array([[("a", 1), ("b", None)], None, []], pa.map_(pa.string(), pa.int8())),
    "map, sorted": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int8(), keys_sorted=True)),
    "map of views": pa.array([[("a", LONG)], None, []], pa.map_(pa.string_view(), pa.string_view())),
    "map not null": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), required(pa.int8(), "value"))),
    "dictionary": dictionary_of("a", None, "b", index=pa.int8(), kind=pa.string()),
    "dictionary of large_string": dictionary_of("a", None, "b", index=pa.uint32(), kind=pa.large_string()),
    "dictionary of binary": dictionary_of(b"a", None, b"\xff", index=pa.int32(), kind=pa.binary()),
    "dictionary, ordered": dictionary_of("a", None, "b", index=pa.int16(), kind=pa.string(), ordered=True),
    "dictionary of int": dictionary_of(7, None, 8, index=pa.int32(), kind=pa.int64()),
    "list of dictionary": pa.array([["a", "b"], None, []], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    "uuid": of_storage(pa.uuid(), UUIDS),
    "json": of_storage(pa.json_(), ['{"a": 1}', None, "[]"]),
    "json of views": of_storage(pa.json_(pa.string_view()), ['{"a": 1}', None, LONG]),
    "bool8": of_storage(pa.bool8(), [1, None, 0]),
    "fixed_shape_tensor": of_storage(pa.fixed_shape_tensor(pa.float32(), [2]), [[1, 2], None, [3, 4]]),
    "opaque": of_storage(pa.opaque(pa.binary(), "geometry", "vendor"), [b"\x01", None, b""]),
    "list of uuid": pa.ListArray.from_arrays([0, 1, 3, 3], of_storage(pa.uuid(), UUIDS)),
    "struct of uuid": pa.StructArray.from_arrays([of_storage(pa.uuid(), UUIDS)], names=["id"]),
}  # fmt: skip
NO_PARQUET = {  # pyarrow writes none, and reads none: where another's schema names one, it reads what is stored
    "month_day_nano_interval": pa.array([(1, 2, 3)] * 3, pa.month_day_nano_interval()),
    "dense_union": pa.UnionArray.from_dense(
        pa.array([0] * 3, pa.int8()), pa.array([0, 1, 2], pa.int32()), [pa.nulls(3)]
    ),
    "sparse_union": pa.UnionArray.from_sparse(pa.array([0] * 3, pa.int8()), [pa.array([1, 2, 3])]),
    "run_end_encoded": pa.RunEndEncodedArray.from_arrays(pa.array([3], pa.int32()), pa.array(["a"])),
    "struct of nothing": pa.array([{}] * 3),
}
LIST_VIEWS = {
    "list_view": pa.ListViewArray.from_arrays([0, 1, 1], [1, 0, 1], pa.array([1, 2], pa.int8())),
    "large_list_view": pa.LargeListViewArray.from_arrays([0, 1, 1], [1, 0, 1], pa.array([1, 2], pa.int8())),
}


def test_every_type_of_arrow_is_here():
    """Those that a later pyarrow has, too: a factory that is not known here fails."""
    factories = {
        name.removesuffix("Type")
        for name in dir(pa)
        if name.endswith("Type") and name not in ("DataType", "DeviceAllocationType")
    }
    assert factories == {
        "Dictionary", "List", "LargeList", "ListView", "LargeListView", "FixedSizeList", "Map", "Struct", "Union",
        "SparseUnion", "DenseUnion", "Timestamp", "Time32", "Time64", "Duration", "FixedSizeBinary", "Decimal32",
        "Decimal64", "Decimal128", "Decimal256", "RunEndEncoded", "BaseExtension", "Extension", "UnknownExtension",
        "FixedShapeTensor", "Opaque", "Uuid", "Json", "Bool8", "PyExtension",
    } & factories  # fmt: skip


def write_any(table: pa.Table, path: Path) -> None:
    """As other writers do: pyarrow (26) cannot write views inside structs."""
    plain = [converted(column.combine_chunks(), without_views(column.type)) for column in table.columns]
    with pq.ParquetWriter(path, pa.table(plain, names=table.column_names).schema, store_schema=False) as writer:
        writer.write_table(pa.table(plain, names=table.column_names), row_group_size=2)
        writer.add_key_value_metadata(
            {"ARROW:schema": base64.b64encode(table.schema.serialize().to_pybytes()).decode()}
        )


@pytest.fixture(scope="module")
def passed(tmp_path_factory) -> tuple[pa.Table, pa.Table]:
    """What pyarrow reads of an input with a column of each type, and of the output, whose order is another."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "in").mkdir()
    write_any(pa.table({"prompt": ["c", "b", "a"], **COLUMNS}), folder / "in" / "a.parquet")
    assert run_here(write_job(folder)).num_errors == 0
    (shard,) = shards_in(folder / "out")
    return pq.read_table(folder / "in" / "a.parquet"), pq.read_table(shard)


@pytest.mark.parametrize("name", COLUMNS)
def test_type_that_is_only_passed_through_comes_out_bit_equal(passed, name):
    given, got = passed
    numbers = {number: place for place, number in enumerate(got["src_row"].to_pylist())}
    chunks = [got[name].slice(numbers[row], 1) for row in range(3)]
    in_order = pa.chunked_array([chunk for each in chunks for chunk in each.chunks], got[name].type)
    assert got.schema.field(name).type.equals(given.schema.field(name).type, check_metadata=True)
    in_order.validate(full=name != NO_TEXT)
    if pa.types.is_floating(given[name].type):
        width = {2: pa.int16(), 4: pa.int32(), 8: pa.int64()}[given[name].type.byte_width]
        assert in_order.combine_chunks().view(width).equals(given[name].combine_chunks().view(width))
    else:
        assert in_order.equals(given[name])


@pytest.mark.parametrize("name", NO_PARQUET)
def test_type_that_no_parquet_file_holds_cannot_travel(name, tmp_path):
    with pytest.raises(pa.ArrowNotImplementedError):
        pq.write_table(pa.table({"x": NO_PARQUET[name]}), tmp_path / "a.parquet")
    assert carrier(NO_PARQUET[name].type) is None or name == "struct of nothing"


@pytest.mark.parametrize("name", LIST_VIEWS)
def test_type_that_cannot_travel_is_refused_by_name_before_planning(name, tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["x"] * 3, "odd": LIST_VIEWS[name]}), tmp_path / "in" / "a.parquet")
    line = refusal(write_job(tmp_path))
    assert line.startswith("output.columns: ")
    assert f"a.parquet with column 'odd' of type {name}<" in line
    assert run_here(write_job(tmp_path, output={"path": "out", "columns": ["prompt"]})).status == "done"


@pytest.mark.parametrize("name", COLUMNS)
def test_every_part_of_a_column_travels_and_comes_back(name):
    for start, length in ((0, 3), (1, 2), (2, 1), (0, 0)):
        array = COLUMNS[name].slice(start, length)
        there = converted(array, carrier(array.type))
        there.validate(full=name != NO_TEXT)
        back = converted(there, array.type)
        back.validate(full=name != NO_TEXT)
        assert back.type.equals(array.type, check_metadata=True)
        assert str(back) == str(array)


@pytest.mark.parametrize("name", COLUMNS)
def test_rows_that_could_not_be_read_are_null_in_every_type(name, tmp_path):
    schema = pa.schema([pa.field("x", COLUMNS[name].type)])
    table = restored(pa.table({"x": pa.nulls(2, carrier(COLUMNS[name].type))}), remembered(schema))
    assert table["x"].null_count == 2
    if name not in ("dictionary of int", "views, deep"):
        pq.write_table(table, tmp_path / "a.parquet")


def test_unknown_extension_type_keeps_its_name(tmp_path):
    """As of geometries, where their package is not installed."""
    (tmp_path / "in").mkdir()
    metadata = {"ARROW:extension:name": "geoarrow.wkb", "ARROW:extension:metadata": "{}"}
    schema = pa.schema([pa.field("prompt", pa.string()), pa.field("place", pa.binary(), metadata=metadata)])
    pq.write_table(pa.table([["x"], [b"\x01"]], schema=schema), tmp_path / "in" / "a.parquet")
    run_here(write_job(tmp_path))
    (shard,) = shards_in(tmp_path / "out")
    got = pq.read_table(shard).schema.field("place").metadata
    assert {key: got[key.encode()].decode() for key in metadata} == metadata


def test_plain_columns_travel_as_they_are():
    schema = pa.schema({"a": pa.string(), "b": pa.list_(pa.int8()), "c": pa.timestamp("ns", "UTC")})
    assert remembered(schema) == {}
    assert carried_schema(schema) == schema


def test_sample_of_an_output_with_views_shows_their_texts(tmp_path):
    (tmp_path / "in").mkdir()
    table = pa.table({"prompt": pa.array(["x", LONG], pa.string_view()), "odd": LIST_VIEWS["list_view"].slice(0, 2)})
    pq.write_table(table.select(["prompt"]), tmp_path / "in" / "a.parquet")
    run_here(write_job(tmp_path))
    assert sorted(row["prompt"] for row in sample_rows(str(tmp_path / "out"), 2, 0)) == [LONG, "x"]
