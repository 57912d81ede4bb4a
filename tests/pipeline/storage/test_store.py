"""Files that appear whole, once."""

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from segue.pipeline.storage.folder import TEMPORARY_PREFIX, LocalStore
from segue.pipeline.storage.store import OutputStorageError


@pytest.fixture
def umask():
    """Set for the test, restored after it."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_store_create_makes_folders_and_reads_back(tmp_path):
    store = LocalStore(tmp_path / "out")
    assert store.create("_job/units/u.parquet", b"content")
    assert store.read("_job/units/u.parquet") == b"content"
    assert store.names() == ["_job/"]


def test_store_second_create_loses_and_changes_nothing(tmp_path):
    store = LocalStore(tmp_path)
    assert store.create("a", b"first")
    assert not store.create("a", b"second")
    assert store.read("a") == b"first"
    assert store.names() == ["a"], "a temporary file was left behind"


def test_store_race_of_sixteen_has_one_winner_whose_content_stays(tmp_path):
    store = LocalStore(tmp_path)
    contents = [bytes([number]) * 100_000 for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda content: store.create("a", content), contents))
    assert won.count(True) == 1
    assert store.read("a") == contents[won.index(True)]
    assert store.names() == ["a"]


def test_store_files_written_by_many_threads_follow_the_umask_and_leave_it(tmp_path, umask):
    umask(0o027)
    store = LocalStore(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.create(str(number), b"x"), range(64)))
    modes = {stat.S_IMODE((tmp_path / str(number)).stat().st_mode) for number in range(64)}
    assert modes == {0o640}
    assert umask(0o022) == 0o027


def test_store_create_whose_temporary_was_cleaned_up_after_completion_is_a_lost_race(tmp_path, monkeypatch):
    store, link = LocalStore(tmp_path), os.link

    def completed_by_another(source, target):
        (tmp_path / "a").write_bytes(b"theirs")
        store.remove_leftovers()
        link(source, target)

    monkeypatch.setattr(os, "link", completed_by_another)
    assert not store.create("a", b"ours")
    assert store.read("a") == b"theirs"


def test_store_folder_that_cannot_be_written_is_a_storage_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputStorageError, match="file"):
        LocalStore(tmp_path / "file").create("a", b"")
    with pytest.raises(OutputStorageError, match="Not a directory"):
        LocalStore(tmp_path / "file").names()


def test_store_missing_file_and_folder_are_told_apart_from_empty_ones(tmp_path):
    store = LocalStore(tmp_path / "nowhere")
    assert store.names() == []
    assert not store.exists("a")
    with pytest.raises(FileNotFoundError):
        store.read("a")


def test_store_data_names_leave_out_what_parquet_readers_ignore(tmp_path):
    store = LocalStore(tmp_path)
    for name in ("part-0", "_SUCCESS", ".hidden", "_job/plan", "data/part-1"):
        store.create(name, b"")
    assert store.data_names() == ["data/", "part-0"]


def test_store_remove_leftovers_leaves_everything_else(tmp_path):
    store = LocalStore(tmp_path)
    store.create("_job/a", b"")
    (tmp_path / f"{TEMPORARY_PREFIX}1").touch()
    (tmp_path / "_job" / f"{TEMPORARY_PREFIX}2").touch()
    store.remove_leftovers()
    assert store.names() == ["_job/"]
    assert os.listdir(tmp_path / "_job") == ["a"]


def test_store_note_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = LocalStore(tmp_path)
    store.overwrite("a", b"first")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputStorageError, match="No space left on device"):
        store.overwrite("a", b"second")
    assert store.names() == ["a"]
    assert store.read("a") == b"first"
