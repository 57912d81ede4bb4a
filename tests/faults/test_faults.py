"""Workers that die, hang or raise, in whole runs on a real Ray: one bad row costs one row, and a run ends."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo_jobs import outcome, segue_process, shards_in, wait_for, worker_pids, write_job
from fsspec.implementations.local import LocalFileSystem
from oracle import check_exact, echo_answer
from two_nodes import two_nodes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")
MAX_TOKENS = 6
TWO_WORKERS = {"min_size": 2, "max_size": 2, "units_in_flight": 4}


def write_rows(folder: Path, special: dict[int, str], num_rows: int = 160) -> Path:
    """Rows of four kinds, of which some have a word in their prompt."""
    (folder / "in").mkdir()
    prompts = [f"{'abcd'[n % 4] * 20} {special.get(n, 'fine')} {n}" for n in range(num_rows)]
    pq.write_table(pa.table({"prompt": prompts, "id": range(num_rows)}), folder / "in" / "a.parquet")
    return folder


def run(folder: Path, source: str, max_rows_per_file: int = 16, **workers: Any) -> tuple[int, dict[str, Any], str]:
    output = {"path": "out", "max_rows_per_file": max_rows_per_file}
    job = write_job(folder, model={"source": source}, workers=TWO_WORKERS | workers, output=output)
    with segue_process(folder, "run", str(job), "--json") as process:
        code, out, err = outcome(process)
    assert "Traceback" not in err, err
    lines = out.splitlines()
    assert len(lines) == (code not in (2, 4, 5)), "stdout is for results"
    return code, json.loads(lines[0]) if lines else {}, err


def check(folder: Path, errors: dict[int, str]) -> None:
    check_exact(
        LocalFileSystem(),
        str(folder / "in"),
        str(folder / "out"),
        answer=lambda row: echo_answer(row["prompt"], MAX_TOKENS),
        errors={("a.parquet", place): code for place, code in errors.items()},
    )


@pytest.mark.chaos
def test_row_that_crashes_and_row_that_hangs_are_marked_and_all_others_are_answered(tmp_path, monkeypatch):
    # As on a machine with many CPUs, where idle workers stay: the next pool is ready before the last one is gone.
    monkeypatch.setenv("RAY_idle_worker_killing_time_threshold_ms", "60000")
    folder = write_rows(tmp_path, {13: "POISON", 30: "STUCK"}, num_rows=48)
    code, summary, _ = run(folder, "echo?crash=POISON&hang=STUCK", max_rows_per_file=4, step_timeout_s=8)
    wanted = {"ROW_TIMEOUT": 1, "WORKER_CRASH": 1}
    assert (code, summary["status"], summary["errors"]) == (0, "done", wanted)
    check(folder, {13: "WORKER_CRASH", 30: "ROW_TIMEOUT"})


@pytest.mark.long
def test_rows_at_which_the_engine_raises_are_marked_with_what_it_raised(tmp_path):
    folder = write_rows(tmp_path, {0: "POISON", 15: "POISON"}, num_rows=16)
    code, _, err = run(folder, "echo?fail=POISON", max_rows_per_file=16, max_size=1, min_size=1)
    assert code == 0, err
    check(folder, dict.fromkeys((0, 15), "WORKER_CRASH"))
    messages = {row["message"] for row in pq.read_table(shards_in(folder / "out")[0])["error"].to_pylist() if row}
    assert messages == {"twice, with this row alone in it, the worker's process ended: RuntimeError"}


@pytest.mark.long
def test_job_whose_every_row_crashes_ends_with_4_and_says_so(tmp_path):
    code, _, err = run(write_rows(tmp_path, {}), "echo?crash=fine")
    assert code == 4, err
    assert "workers died, and nothing was committed meanwhile" in err
    assert "single rows that were tried alone died, too" in err
    assert not (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.long
def test_rows_that_crash_at_the_front_of_every_unit_do_not_end_the_job(tmp_path):
    folder = write_rows(tmp_path, dict.fromkeys(range(4), "AAA"), num_rows=40)
    code, _, err = run(folder, "echo?crash=AAA", max_rows_per_file=10)
    assert code == 0, err
    check(folder, dict.fromkeys(range(4), "WORKER_CRASH"))


@pytest.mark.long
def test_worker_that_is_frozen_is_killed_and_costs_nothing(tmp_path):
    folder = write_rows(tmp_path, {})
    job = write_job(
        folder,
        model={"source": "echo:0.4"},
        workers={"units_in_flight": 1, "step_timeout_s": 8},
        output={"path": "out", "max_rows_per_file": 16},
    )
    with segue_process(folder, "run", str(job), "--json") as process:
        wait_for(lambda: shards_in(folder / "out"), process)
        for pid in worker_pids(process.pid):
            os.kill(pid, signal.SIGSTOP)
        code, out, err = outcome(process)
    assert (code, json.loads(out)["num_errors"]) == (0, 0), err
    assert "lost with their workers" in err
    check(folder, {})


@pytest.mark.long
def test_too_many_crashing_rows_stop_the_job_at_the_error_limit(tmp_path):
    folder = write_rows(tmp_path, dict.fromkeys(range(0, 1200, 10), "POISON"), num_rows=1200)
    output = {"path": "out", "max_rows_per_file": 1200}
    job = write_job(
        folder,
        model={"source": "echo?fail=POISON"},
        output=output,
        workers={"units_in_flight": 1},
        limits={"max_error_rate": 0.001},
    )
    with segue_process(folder, "run", str(job), "--json") as process:
        code, out, err = outcome(process)
    assert (code, json.loads(out)["status"]) == (3, "incomplete"), err


@pytest.mark.long
def test_node_that_vanishes_costs_nothing(tmp_path, monkeypatch):
    folder = write_rows(tmp_path, {}, num_rows=64)
    workers = {"min_size": 2, "max_size": 2, "units_in_flight": 1, "threads": 1}
    output = {"path": "out", "max_rows_per_file": 8}
    job = write_job(folder, model={"source": "echo:1"}, workers=workers, output=output)
    with two_nodes() as (address, kill):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with segue_process(folder, "run", str(job), "--json", "--quiet") as process:
            wait_for(lambda: shards_in(folder / "out"), process)
            kill()
            code, out, err = outcome(process)
    assert (code, json.loads(out)["num_errors"]) == (0, 0), err
    check(folder, {})
