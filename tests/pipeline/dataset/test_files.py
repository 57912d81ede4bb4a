"""Input files: found, opened by their footers, and identified."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parquet_files import write_numbered

from segue.pipeline.dataset.blocks import InputChanged, read_rows
from segue.pipeline.dataset.files import cut_rows, discover
from segue.pipeline.problems import JobRefused


def names(*paths: Path | str) -> list[str]:
    return [file.src_path for file in discover([str(path) for path in paths])]


def refusal(*paths: Path | str) -> str:
    with pytest.raises(JobRefused) as refused:
        discover([str(path) for path in paths])
    return str(refused.value)


def test_discover_folder_takes_parquet_files_below_it_in_order(tmp_path):
    for name in ("b.parquet", "a/z.parquet", "a.parquet", "c/d/e.parquet", "k=v/p.parquet"):
        write_numbered(tmp_path / name)
    for name in ("_job/x.parquet", ".hidden/x.parquet", "_x.parquet", ".x.parquet", "c/_tmp/x.parquet"):
        write_numbered(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no Parquet")
    expected = ["a.parquet", "a/z.parquet", "b.parquet", "c/d/e.parquet", "k=v/p.parquet"]
    assert names(tmp_path) == expected
    assert names(f"{tmp_path}/") == expected


def test_discover_hidden_parent_of_the_folder_does_not_matter(tmp_path):
    write_numbered(tmp_path / "_x/.y/a.parquet")
    assert names(tmp_path / "_x/.y") == ["a.parquet"]


def test_discover_single_file_may_have_any_name(tmp_path):
    assert names(write_numbered(tmp_path / "_data.pq")) == ["_data.pq"]


def test_discover_folder_named_like_a_file_is_read_as_a_folder(tmp_path):
    write_numbered(tmp_path / "spark.parquet/part-0.parquet")
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
        write_numbered(tmp_path / name)
    assert names(tmp_path / pattern) == expected


def test_discover_name_with_glob_characters_is_a_name_if_it_exists(tmp_path):
    write_numbered(tmp_path / "a[1].parquet")
    write_numbered(tmp_path / "a1.parquet")
    assert names(tmp_path / "a[1].parquet") == ["a[1].parquet"]


def test_discover_several_paths_are_named_below_their_common_folder(tmp_path):
    write_numbered(tmp_path / "x/a.parquet")
    write_numbered(tmp_path / "y/z/a.parquet")
    assert names(tmp_path / "y", tmp_path / "x/a.parquet") == ["x/a.parquet", "y/z/a.parquet"]
    assert names(tmp_path / "x", tmp_path / "x/*.parquet", tmp_path / "x/a.parquet") == ["a.parquet"]


def test_discover_all_that_is_wrong_is_named_at_once(tmp_path):
    good = write_numbered(tmp_path / "good.parquet")
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
    write_numbered(tmp_path / "tickets.parquet")
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
    write_numbered(tmp_path / "outside/x.parquet")
    write_numbered(tmp_path / "in/a.parquet")
    (tmp_path / "in/b.parquet").symlink_to(tmp_path / "outside/x.parquet")
    (tmp_path / "in/c").symlink_to(tmp_path / "outside")
    for path in (tmp_path / "in", tmp_path / "in/**"):
        lines = refusal(path).splitlines()
        assert len(lines) == 2
        assert all("link out of the input folder" in line for line in lines)


def test_discover_link_inside_the_folder_does_not_repeat_rows(tmp_path):
    write_numbered(tmp_path / "b.parquet")
    write_numbered(tmp_path / "run1/c.parquet")
    write_numbered(tmp_path / ".store/blob")
    (tmp_path / "a.parquet").symlink_to("b.parquet")
    (tmp_path / "d.parquet").symlink_to(".store/blob")
    (tmp_path / "latest").symlink_to("run1")
    (tmp_path / "run1/loop").symlink_to("..")
    assert names(tmp_path) == ["b.parquet", "d.parquet", "run1/c.parquet"]
    assert names(tmp_path / "**/*.parquet") == ["b.parquet", "d.parquet", "run1/c.parquet"]


def test_discover_link_named_by_the_user_is_followed(tmp_path):
    write_numbered(tmp_path / "real/a.parquet")
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
    path = write_numbered(tmp_path / "a.parquet", 5, row_group_size=2)
    (file,) = discover([str(path)])
    assert (file.num_rows, file.row_groups, file.size) == (5, (2, 2, 1), path.stat().st_size)
    assert file.path == str(path)
    assert len(file.row_group_bytes) == 3
    assert pickle.loads(pickle.dumps(file)) == file


def test_identity_changes_with_content_and_not_with_place(tmp_path):
    first = write_numbered(tmp_path / "x/a.parquet", 3)
    (before,) = discover([str(first)])
    (tmp_path / "y").mkdir()
    (moved,) = discover([str(first.rename(tmp_path / "y/a.parquet"))])
    assert moved.identity() == before.identity()
    os.utime(moved.path, ns=(0, 5))
    assert discover([moved.path])[0].identity() != before.identity()
    write_numbered(Path(moved.path), 4)
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
        memory.pipe_file(f"/bucket/in/{name}", write_numbered(tmp_path / "f.parquet", 3, row_group_size=2).read_bytes())
    assert names("memory://bucket/in") == ["a.parquet", "d/b.parquet"]
    assert names("memory://bucket/in/**/*.parquet") == ["a.parquet", "d/b.parquet"]
    assert names("memory://bucket/in/*.parquet") == ["a.parquet"]
    (file,) = discover(["memory://bucket/in/d/b.parquet"])
    assert read_rows(file, 1, 3, pa.schema({"body": pa.string()})).column("body").to_pylist() == ["f-1", "f-2"]
    memory.pipe_file("/bucket/in/d/b.parquet", b"something else")
    with pytest.raises(InputChanged, match=r"b\.parquet"):
        read_rows(file, 0, 1, pa.schema({"body": pa.string()}))


def test_remote_path_that_is_missing_is_refused(memory):
    assert "memory://none/x.parquet" in refusal("memory://none/x.parquet")
    assert "no input file" in refusal("memory://none/*.parquet")


def test_discover_paths_of_two_file_systems_are_refused(tmp_path, memory):
    memory.pipe_file("/b/a.parquet", write_numbered(tmp_path / "a.parquet").read_bytes())
    assert "several file systems" in refusal(tmp_path, "memory://b/a.parquet")


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
