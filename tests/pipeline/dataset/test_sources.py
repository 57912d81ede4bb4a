"""Input files: found, identified, and read row by row with stable provenance."""

import datetime
import os
import pickle
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.pipeline.dataset.blocks import InputChanged, block_of, read_rows, row_ranges
from segue.pipeline.dataset.files import InputFile, cut_rows, discover
from segue.pipeline.dataset.ray_source import RowReader, RowSource
from segue.pipeline.problems import JobRefused

COLUMNS = pa.schema({"body": pa.string()})


def write(path: Path, num_rows: int = 2, *, row_group_size: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"body": [f"{path.stem}-{i}" for i in range(num_rows)], "n": list(range(num_rows))})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def names(*paths: Path | str) -> list[str]:
    return [file.src_path for file in discover([str(path) for path in paths])]


def refusal(*paths: Path | str) -> str:
    with pytest.raises(JobRefused) as refused:
        discover([str(path) for path in paths])
    return str(refused.value)


def test_discover_folder_takes_parquet_files_below_it_in_order(tmp_path):
    for name in ("b.parquet", "a/z.parquet", "a.parquet", "c/d/e.parquet", "k=v/p.parquet"):
        write(tmp_path / name)
    for name in ("_job/x.parquet", ".hidden/x.parquet", "_x.parquet", ".x.parquet", "c/_tmp/x.parquet"):
        write(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no Parquet")
    expected = ["a.parquet", "a/z.parquet", "b.parquet", "c/d/e.parquet", "k=v/p.parquet"]
    assert names(tmp_path) == expected
    assert names(f"{tmp_path}/") == expected


def test_discover_hidden_parent_of_the_folder_does_not_matter(tmp_path):
    write(tmp_path / "_x/.y/a.parquet")
    assert names(tmp_path / "_x/.y") == ["a.parquet"]


def test_discover_single_file_may_have_any_name(tmp_path):
    assert names(write(tmp_path / "_data.pq")) == ["_data.pq"]


def test_discover_folder_named_like_a_file_is_read_as_a_folder(tmp_path):
    write(tmp_path / "spark.parquet/part-0.parquet")
    assert names(tmp_path) == ["spark.parquet/part-0.parquet"]
    assert names(tmp_path / "*.parquet") == ["spark.parquet/part-0.parquet"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.parquet", ["a.parquet", "b.parquet"]),
        ("[b-z].parquet", ["b.parquet"]),
        ("?.parquet", ["a.parquet", "b.parquet"]),
        ("*/*.parquet", ["d/c.parquet"]),
        ("**/*.parquet", ["a.parquet", "b.parquet", "d/c.parquet", "d/e/f.parquet"]),
        ("d/**/f*", ["e/f.parquet"]),
        ("*.pq", ["x.pq"]),
    ],
)
def test_discover_glob_takes_what_it_matches(tmp_path, pattern, expected):
    for name in ("a.parquet", "b.parquet", "d/c.parquet", "d/e/f.parquet", "x.pq", "_a.parquet", "_d/a.parquet"):
        write(tmp_path / name)
    assert names(tmp_path / pattern) == expected


def test_discover_name_with_glob_characters_is_a_name_if_it_exists(tmp_path):
    write(tmp_path / "a[1].parquet")
    write(tmp_path / "a1.parquet")
    assert names(tmp_path / "a[1].parquet") == ["a[1].parquet"]


def test_discover_several_paths_are_named_below_their_common_folder(tmp_path):
    write(tmp_path / "x/a.parquet")
    write(tmp_path / "y/z/a.parquet")
    assert names(tmp_path / "y", tmp_path / "x/a.parquet") == ["x/a.parquet", "y/z/a.parquet"]
    assert names(tmp_path / "x", tmp_path / "x/*.parquet", tmp_path / "x/a.parquet") == ["a.parquet"]


def test_discover_all_that_is_wrong_is_named_at_once(tmp_path):
    good = write(tmp_path / "good.parquet")
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "text.parquet").write_text("these are no columns")
    (tmp_path / "short.parquet").write_bytes(good.read_bytes()[:-5])
    (tmp_path / "secret.parquet").write_bytes(good.read_bytes()[:-4] + b"PARE")
    (tmp_path / "long.parquet").write_bytes(b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1" + bytes(60) + (50).to_bytes(4, "little") + b"PAR1")
    lines = refusal(tmp_path).splitlines()
    for name, word in [
        ("empty", "0 bytes"),
        ("text", "PAR1"),
        ("short", "truncated"),
        ("secret", "encrypted"),
        ("long", "footer of 2,147,483,655 bytes"),
        ("torn", "Parquet"),
    ]:
        assert any(f"{name}.parquet" in line and word in line for line in lines), name
    assert len(lines) == 6


def test_discover_missing_path_names_its_neighbour(tmp_path):
    write(tmp_path / "tickets.parquet")
    message = refusal(tmp_path / "ticket.parquet", tmp_path / "none" / "x.parquet")
    assert len(message.splitlines()) == 2
    assert "did you mean 'tickets.parquet'" in message


@pytest.mark.parametrize("path", ["", "*.parquet", "none/*.parquet", "**"])
def test_discover_nothing_found_is_refused(tmp_path, path):
    (tmp_path / "sub").mkdir()
    assert "no input file" in refusal(tmp_path / path)


def test_discover_pipe_is_refused_without_opening_it(tmp_path):
    os.mkfifo(tmp_path / "a.parquet")
    assert "a pipe" in refusal(tmp_path)
    assert "a pipe" in refusal(tmp_path / "a.parquet")
    assert "a pipe" in refusal(tmp_path / "*.parquet")


def test_discover_link_out_of_the_folder_is_refused(tmp_path):
    write(tmp_path / "outside/x.parquet")
    write(tmp_path / "in/a.parquet")
    (tmp_path / "in/b.parquet").symlink_to(tmp_path / "outside/x.parquet")
    (tmp_path / "in/c").symlink_to(tmp_path / "outside")
    for path in (tmp_path / "in", tmp_path / "in/**"):
        lines = refusal(path).splitlines()
        assert len(lines) == 2
        assert all("link out of the input folder" in line for line in lines)


def test_discover_link_inside_the_folder_does_not_repeat_rows(tmp_path):
    write(tmp_path / "b.parquet")
    write(tmp_path / "run1/c.parquet")
    write(tmp_path / ".store/blob")
    (tmp_path / "a.parquet").symlink_to("b.parquet")
    (tmp_path / "d.parquet").symlink_to(".store/blob")
    (tmp_path / "latest").symlink_to("run1")
    (tmp_path / "run1/loop").symlink_to("..")
    assert names(tmp_path) == ["b.parquet", "d.parquet", "run1/c.parquet"]
    assert names(tmp_path / "**/*.parquet") == ["b.parquet", "d.parquet", "run1/c.parquet"]


def test_discover_link_named_by_the_user_is_followed(tmp_path):
    write(tmp_path / "real/a.parquet")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file.parquet").symlink_to("real/a.parquet")
    assert names(tmp_path / "link") == ["a.parquet"]
    assert names(tmp_path / "file.parquet") == ["file.parquet"]


def test_discover_broken_link_is_refused(tmp_path):
    (tmp_path / "a.parquet").symlink_to("gone.parquet")
    assert "a.parquet" in refusal(tmp_path)


def test_discover_names_a_file_however_long_its_path_is(tmp_path):
    assert "tickets.parquet" in refusal(tmp_path / ("long" * 30) / "tickets.parquet")


def test_discover_reads_footers_larger_than_one_tail(tmp_path):
    table = pa.table({f"column_{i:04}_{'x' * 40}": [1] for i in range(1500)})
    pq.write_table(table, tmp_path / "wide.parquet")
    (file,) = discover([str(tmp_path)])
    assert file.schema.equals(table.schema)


def test_discover_file_tells_what_a_plan_needs(tmp_path):
    path = write(tmp_path / "a.parquet", 5, row_group_size=2)
    (file,) = discover([str(path)])
    assert (file.num_rows, file.row_groups, file.size) == (5, (2, 2, 1), path.stat().st_size)
    assert file.path == str(path)
    assert len(file.row_group_bytes) == 3
    assert pickle.loads(pickle.dumps(file)) == file


def test_identity_changes_with_content_and_not_with_place(tmp_path):
    first = write(tmp_path / "x/a.parquet", 3)
    (before,) = discover([str(first)])
    (tmp_path / "y").mkdir()
    (moved,) = discover([str(first.rename(tmp_path / "y/a.parquet"))])
    assert moved.identity() == before.identity()
    os.utime(moved.path, ns=(0, 5))
    assert discover([moved.path])[0].identity() != before.identity()
    write(Path(moved.path), 4)
    (changed,) = discover([moved.path])
    assert changed.footer != before.footer
    assert changed.schema_sha == before.schema_sha


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_remote_files_are_found_and_read_like_local_ones(tmp_path, memory):
    for name in ("a.parquet", "d/b.parquet", "_job/x.parquet", "notes.txt"):
        memory.pipe_file(f"/bucket/in/{name}", write(tmp_path / "f.parquet", 3, row_group_size=2).read_bytes())
    assert names("memory://bucket/in") == ["a.parquet", "d/b.parquet"]
    assert names("memory://bucket/in/**/*.parquet") == ["a.parquet", "d/b.parquet"]
    assert names("memory://bucket/in/*.parquet") == ["a.parquet"]
    (file,) = discover(["memory://bucket/in/d/b.parquet"])
    assert read_rows(file, 1, 3, COLUMNS).column("body").to_pylist() == ["f-1", "f-2"]
    memory.pipe_file("/bucket/in/d/b.parquet", b"something else")
    with pytest.raises(InputChanged, match=r"b\.parquet"):
        read_rows(file, 0, 1, COLUMNS)


def test_remote_path_that_is_missing_is_refused(memory):
    assert "memory://none/x.parquet" in refusal("memory://none/x.parquet")
    assert "no input file" in refusal("memory://none/*.parquet")


def test_discover_paths_of_two_file_systems_are_refused(tmp_path, memory):
    memory.pipe_file("/b/a.parquet", write(tmp_path / "a.parquet").read_bytes())
    assert "several file systems" in refusal(tmp_path, "memory://b/a.parquet")


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
    (file,) = discover([str(write(tmp_path / "a.parquet", 170_000, row_group_size=160_000))])
    numbers = read_rows(file, 60_000, 165_000, pa.schema({"n": pa.int64()})).column("n")
    assert numbers.to_pylist() == list(range(60_000, 165_000))


def test_read_rows_outside_the_file_is_an_error(tmp_path):
    (file,) = discover([str(write(tmp_path / "a.parquet", 3))])
    with pytest.raises(ValueError, match="0 to 3"):
        read_rows(file, 0, 4, COLUMNS)


def test_read_rows_of_a_changed_file_is_an_error(tmp_path):
    path = write(tmp_path / "a.parquet", 3)
    (file,) = discover([str(path)])
    write(path, 4)
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


@given(
    st.lists(st.lists(st.integers(0, 9), unique=True).map(sorted), max_size=5),
    st.integers(0, 30),
    st.none() | st.integers(0, 30),
)
def test_cut_rows_counts_over_all_files(numbers, start, stop):
    cut = cut_rows([np.array(own, np.int64) for own in numbers], start, stop)
    counted = [(file, row) for file, own in enumerate(numbers) for row in own]
    assert [(file, row) for file, own in enumerate(cut) for row in own] == counted[start:stop]
    ranges = cut_rows([range(len(own)) for own in numbers], start, stop)
    assert list(map(len, ranges)) == list(map(len, cut))


def rows_of(source: RowSource) -> list[tuple[str, int, str]]:
    """What the read tasks give when they are called one after the other, without Ray."""
    blocks = [block for task in source.get_read_tasks(200) for block in task()]
    table = pa.concat_tables(blocks)  # fails if blocks differ in schema
    bodies = [row["body"] for row in table.column("input").to_pylist()]
    return list(zip(table.column("src_path").to_pylist(), table.column("src_row").to_pylist(), bodies, strict=True))


@pytest.mark.parametrize("bounds", [(0, None), (0, 0), (0, 1), (0, 7), (3, 12), (12, 13), (5, 19), (23, 1000)])
def test_source_rows_and_provenance_do_not_depend_on_row_groups(tmp_path, bounds):
    expected = [(f"{stem}.parquet", i, f"{stem}-{i}") for stem in ("a", "b") for i in range(12)][slice(*bounds)]
    for row_group_size in (1, 2, 5, 12, 100):
        folder = tmp_path / str(row_group_size)
        for stem in ("a", "b"):
            write(folder / f"{stem}.parquet", 12, row_group_size=row_group_size)
        files = discover([str(folder)])
        rows = cut_rows([range(file.num_rows) for file in files], *bounds)
        assert rows_of(RowSource(files, RowReader(COLUMNS), rows)) == expected
        if expected:
            scattered = [np.array(numbers[::2], np.int64) for numbers in rows]
            wanted = [row for row in expected if row[1] in scattered["ab".index(row[0][0])]]
            assert rows_of(RowSource(files, RowReader(COLUMNS), scattered)) == wanted


def test_source_large_row_group_comes_in_several_blocks(tmp_path):
    write(tmp_path / "a.parquet", 120_000)
    (task,) = RowSource(discover([str(tmp_path)]), RowReader(COLUMNS)).get_read_tasks(1)
    blocks = list(task())
    assert [block.num_rows for block in blocks] == [50_000, 50_000, 20_000]
    assert [block.column("src_row")[0].as_py() for block in blocks] == [0, 50_000, 100_000]


def test_source_of_no_rows_gives_an_empty_block_with_the_schema(tmp_path):
    write(tmp_path / "a.parquet", 0)
    (task,) = RowSource(discover([str(tmp_path)]), RowReader(COLUMNS)).get_read_tasks(1)
    (block,) = task()
    assert block.num_rows == 0
    assert block.schema.names == ["src_path", "src_row", "input"]


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_source_under_ray_gives_every_row_once_with_its_types(tmp_path, local_ray):
    tables = [typed_table("pq"), typed_table("qs"), typed_table("tp")]
    for table, stem, size in zip(tables, ("a", "b", "sub/c"), (1, 2, 5), strict=True):
        (tmp_path / stem).parent.mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / f"{stem}.parquet", row_group_size=size)
    files = discover([str(tmp_path)])
    dataset = ray.data.read_datasource(RowSource(files, RowReader(files[0].schema), cut_rows([range(5)] * 3, 0, 14)))
    # A batch over blocks of several files: dictionaries and nulls must survive being put together.
    dataset = dataset.map_batches(lambda batch: batch, batch_size=None, batch_format="pyarrow").repartition(2)
    batches = list(dataset.iter_batches(batch_size=14, batch_format="pyarrow"))
    rows = pa.concat_tables(batches).sort_by([("src_path", "ascending"), ("src_row", "ascending")])
    expected = [(f"{stem}.parquet", i) for stem in ("a", "b", "sub/c") for i in range(5)][:14]
    assert list(zip(rows["src_path"].to_pylist(), rows["src_row"].to_pylist(), strict=True)) == expected
    assert rows["input"].type == pa.struct(list(tables[0].schema))
    assert rows["input"].to_pylist() == [row for table in tables for row in table.to_pylist()][:14]
