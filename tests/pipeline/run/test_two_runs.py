"""Two runs on one output folder: each row once, and the second is told of the first."""

import json
import os
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from echo_jobs import outcome, segue_process, shards_in, wait_for, write_input, write_job
from fsspec.implementations.local import LocalFileSystem
from oracle import check_exact, echo_answer

from segue.pipeline.ledger.presence import FOLDER, Presence, RunNote, runs_at_work
from segue.pipeline.storage.folder import LocalStore

TOLD = "another run is at work on this output: process"


def check(folder: Path) -> None:
    answer = lambda row: echo_answer(row["prompt"], 6)  # noqa: E731
    check_exact(LocalFileSystem(), str(folder / "in"), str(folder / "out"), answer=answer)


def note(**changes: object) -> RunNote:
    now = time.time()
    return replace(RunNote(socket.gethostname(), os.getpid(), now, now), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "is_at_work"),
    [
        ({}, True),
        ({"host": "elsewhere", "pid": 1 << 30}, True),
        ({"pid": 1 << 30}, False),
        ({"renewed": time.time() - 3600}, False),
        ({"has_ended": True}, False),
    ],
    ids=["here", "elsewhere", "killed", "silent", "ended"],
)
def test_a_run_is_at_work_until_its_note_says_otherwise(tmp_path, changes, is_at_work):
    store = LocalStore(tmp_path)
    store.overwrite(f"{FOLDER}/a.json", json.dumps(asdict(note(**changes))).encode())
    store.overwrite(f"{FOLDER}/b.json", b'{"half": ')
    assert list(runs_at_work(store)) == (["a.json"] if is_at_work else [])


def test_the_later_of_two_runs_is_told_of_the_first_and_nobody_of_himself(tmp_path):
    store, first, second, third = LocalStore(tmp_path), [], [], []
    with Presence(store, first.append), Presence(store, second.append):
        pass
    with Presence(store, third.append):
        pass
    assert (first, third) == ([], [])
    assert len(second) == 1
    assert f"{TOLD} {os.getpid()} on {socket.gethostname()}" in second[0]


@pytest.mark.long
def test_two_runs_started_together_and_one_late_write_each_row_once(tmp_path):
    slow = {"model": {"source": "echo:2"}, "workers": {"units_in_flight": 1}}
    job = write_job(write_input(tmp_path), **slow, output={"path": "out", "max_rows_per_file": 4})
    command = ("run", str(job), "--json", "--quiet")
    with segue_process(tmp_path, *command) as first, segue_process(tmp_path, *command) as second:
        wait_for(lambda: len(shards_in(tmp_path / "out")) > 1, first)
        with segue_process(tmp_path, "run", str(job), "--json") as late:
            ends = [outcome(process) for process in (first, second, late)]
    assert [code for code, _, _ in ends] == [0, 0, 0], ends
    assert TOLD in ends[2][2]
    assert {json.loads(out)["status"] for _, out, _ in ends} <= {"done", "already_complete"}
    check(tmp_path)


@pytest.mark.long
def test_of_two_jobs_started_together_in_one_folder_one_is_refused_and_leaves_nothing(tmp_path):
    output = {"path": "out", "max_rows_per_file": 4}
    first = write_job(write_input(tmp_path), output=output)
    second = write_job(tmp_path, "other.yaml", output=output, seed=1)  # its units hold the same rows
    with segue_process(tmp_path, "run", str(first)) as one, segue_process(tmp_path, "run", str(second)) as other:
        ends = {outcome(one)[0]: first, outcome(other)[0]: second}
    assert set(ends) == {0, 2}
    check(tmp_path)
    units = json.loads((tmp_path / "out" / "_job" / "manifest.json").read_text())["units"]
    assert len(list((tmp_path / "out" / "_job" / "units").iterdir())) == len(units)
