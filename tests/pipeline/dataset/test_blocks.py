"""Rows of input files, read as blocks with stable provenance."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parquet_files import typed_table, write_numbered

from segue.pipeline.dataset.blocks import InputChanged, block_of, read_rows, row_ranges
from segue.pipeline.dataset.files import InputFile, discover

COLUMNS = pa.schema({"body": pa.string()})


@given(
    groups=st.lists(st.integers(1, 9), min_size=1, max_size=6), bounds=st.tuples(st.integers(0, 54), st.integers(0, 54))
)
@settings(max_examples=60, deadline=None)
def test_read_rows_gives_the_slice_whatever_the_row_groups(tmp_path_factory, groups, bounds):
    path = tmp_path_factory.getbasetemp() / "groups.parquet"
    total = sum(groups)
    with pq.ParquetWriter(path, pa.schema({"n": pa.int64()})) as writer:
        for first, size in zip([sum(groups[:i]) for i in range(len(groups))], groups, strict=True):
            writer.write_table(pa.table({"n": list(range(first, first + size))}))
    (file,) = discover([str(path)])
    assert file.row_groups == tuple(groups)
    start, stop = sorted(min(bound, total) for bound in bounds)
    assert read_rows(file, start, stop, file.schema).column("n").to_pylist() == list(range(start, stop))


def test_read_rows_begins_and_ends_inside_a_large_row_group(tmp_path):
    (file,) = discover([str(write_numbered(tmp_path / "a.parquet", 170_000, row_group_size=160_000))])
    numbers = read_rows(file, 60_000, 165_000, pa.schema({"n": pa.int64()})).column("n")
    assert numbers.to_pylist() == list(range(60_000, 165_000))


def test_read_rows_outside_the_file_is_an_error(tmp_path):
    (file,) = discover([str(write_numbered(tmp_path / "a.parquet", 3))])
    with pytest.raises(ValueError, match="0 to 3"):
        read_rows(file, 0, 4, COLUMNS)


def test_read_rows_of_a_changed_file_is_an_error(tmp_path):
    path = write_numbered(tmp_path / "a.parquet", 3)
    (file,) = discover([str(path)])
    write_numbered(path, 4)
    with pytest.raises(InputChanged, match=r"a\.parquet"):
        read_rows(file, 0, 3, COLUMNS)


def test_read_rows_of_a_flipped_page_is_an_error_where_pages_have_checksums(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"body": ["a", "hay" * 9, "needle" * 9, "z"]})
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"needle", raw.index(b"hay"))] ^= 1  # the page itself, not the statistics in its header
    path.write_bytes(raw)
    (file,) = discover([str(path)])
    with pytest.raises(OSError, match=r"CRC|checksum"):
        read_rows(file, 0, 4, COLUMNS)


def test_read_rows_keeps_types_and_values(tmp_path):
    table = typed_table()
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    (file,) = discover([str(tmp_path)])
    assert read_rows(file, 0, 5, file.schema).equals(table)
    block = block_of(read_rows(file, 1, 4, file.schema), "a.parquet", 1)
    assert block.schema.field("input").type == pa.struct(list(table.schema))
    assert block.column("input").to_pylist() == table.slice(1, 3).to_pylist()


def test_read_rows_takes_the_wanted_columns_only_and_in_order(tmp_path):
    table = pa.table([[1], [2], ["x"], [3]], names=["a", "a.b", "c", "dup"]).append_column("dup", pa.array([4]))
    pq.write_table(table, tmp_path / "a.parquet")
    (file,) = discover([str(tmp_path)])
    assert read_rows(file, 0, 1, pa.schema({"c": pa.string(), "a": pa.int64()})).to_pylist() == [{"c": "x", "a": 1}]
    assert read_rows(file, 0, 1, pa.schema({"a.b": pa.int64()})).to_pylist() == [{"a.b": 2}]


def test_read_rows_casts_to_the_type_of_all_files(tmp_path):
    pq.write_table(pa.table({"a": ["x", None], "b": pa.nulls(2)}), tmp_path / "a.parquet")
    (file,) = discover([str(tmp_path)])
    wanted = pa.schema({"a": pa.large_string(), "b": pa.dictionary(pa.int32(), pa.string())})
    rows = read_rows(file, 0, 2, wanted)
    assert rows.schema == wanted
    assert rows.to_pylist() == [{"a": "x", "b": None}, {"a": None, "b": None}]


def parquet_file(row_groups: tuple[int, ...], num_bytes: int = 1) -> InputFile:
    total = sum(row_groups)
    sizes = (num_bytes,) * len(row_groups)
    return InputFile("/none", "a", 100, "v", "f", total, row_groups, sizes, pa.schema({}))


@given(
    groups=st.lists(st.integers(0, 20), max_size=12).map(tuple),
    bounds=st.tuples(st.integers(0, 250), st.integers(0, 250)),
    task_bytes=st.integers(1, 40),
)
@settings(max_examples=200, deadline=None)
def test_row_ranges_cover_each_row_once_and_stay_small(groups, bounds, task_bytes):
    file = parquet_file(groups, num_bytes=7)
    first, end = sorted(min(bound, file.num_rows) for bound in bounds)
    ranges = row_ranges(file, first, end, task_bytes)
    assert [row for rows in ranges for row in range(rows.start, rows.stop)] == list(range(first, end))
    assert all(rows.start < rows.stop for rows in ranges)
    edges = {sum(groups[:i]) for i in range(len(groups) + 1)} | {first}
    assert all(rows.start in edges for rows in ranges)
    assert all(rows.num_bytes <= max(task_bytes, 7) or 0 in groups for rows in ranges)
