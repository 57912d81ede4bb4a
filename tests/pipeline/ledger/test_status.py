"""How far a job is, from its folder alone."""

import asyncio
import json
import os
import socket
import time

import pytest
from commands import finished_output, segue
from echo_jobs import NUM_ROWS, write_input, write_job
from ready_jobs import ready_job

from segue.pipeline.ledger.completeness import write_success
from segue.pipeline.ledger.presence import FOLDER, Presence
from segue.pipeline.ledger.status import status_of
from segue.pipeline.run.run import plan_job
from segue.pipeline.run.worker import UnitWorker

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")


def test_status_of_a_stopped_run_counts_rows_and_errors_and_says_how_to_go_on(tmp_path):
    output = finished_output(tmp_path, [b"x", None, b"y"], [None, {"code": "BAD_UTF8", "message": "m"}, None])
    code, out, _ = segue("status", output)
    *text, line = out.splitlines()
    found = json.loads(line)
    assert code == 0
    assert (found["status"], found["rows"], found["rows_done"], found["units_done"]) == ("stopped", 3, 3, 1)
    assert text[-1] == "nobody is at work on it: the same `segue run JOB.yaml` goes on where it stopped"


def test_status_names_who_is_at_work(tmp_path):
    output = finished_output(tmp_path, [b"x"], [None])
    note = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time(), "renewed": time.time()}
    (output / FOLDER).mkdir(parents=True)
    (output / FOLDER / "a.json").write_text(json.dumps(note))
    found = status_of(str(output))
    assert (found.status, [run["pid"] for run in found.runs]) == ("running", [os.getpid()])
    (output / FOLDER / "a.json").write_text(json.dumps(note | {"has_ended": True}))
    assert status_of(str(output)).status == "stopped"


def test_status_before_there_is_a_plan_says_that_it_is_being_made(tmp_path):
    note = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time(), "renewed": time.time()}
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FOLDER / "a.json").write_text(json.dumps(note))
    code, out, _ = segue("status", tmp_path)
    assert code == 0
    assert f"at work: process {os.getpid()}" in out
    assert json.loads(out.splitlines()[-1])["status"] == "planning"
    (tmp_path / FOLDER / "a.json").write_text(json.dumps(note | {"has_ended": True}))
    code, _, err = segue("status", tmp_path)
    assert code == 2
    assert "is not an output folder of Segue" in err


def test_status_of_what_is_no_output_is_refused(tmp_path):
    code, _, err = segue("status", tmp_path)
    assert code == 2
    assert "is not an output folder of Segue" in err


def test_status_of_a_run_at_work_and_done(tmp_path):
    job = ready_job(write_job(write_input(tmp_path)))
    manifest = plan_job(job, lambda line: None)
    worker = UnitWorker(job.worker_spec(threads=1))
    with Presence(job.store, lambda line: None):
        asyncio.run(worker.run_unit(manifest.units[0]))
        found = status_of(str(tmp_path / "out"))
        assert (found.status, found.units_done, found.rows_done) == ("running", 1, manifest.units[0].num_rows)
        assert found.share_done == found.rows_done / NUM_ROWS
        for unit in manifest.units[1:]:
            asyncio.run(worker.run_unit(unit))
        write_success(job.store, manifest)
    assert worker._loop is not None
    worker._loop.stop()
    done = status_of(str(tmp_path / "out"))
    assert (done.status, done.rows_done, done.share_done, done.runs) == ("done", NUM_ROWS, 1.0, [])


def test_status_of_an_output_that_lost_a_shard_counts_what_is_there(tmp_path):
    output = finished_output(tmp_path, [b"x", b"y"], [None, None])
    (shard,) = output.glob("*.parquet")
    shard.unlink()
    found = status_of(str(output))
    assert (found.rows, found.rows_done, found.units_done, found.share_done) == (2, 0, 0, 0.0)


def test_status_of_a_training_is_its_last_step(tmp_path):
    output = finished_output(tmp_path, [b"x"], [None])
    manifest = output / "_job" / "manifest.json"
    fields = json.loads(manifest.read_bytes())
    lines = [{"step": 3, "num_steps": 12, "loss": 1.5}, {"step": 3, "eval_loss": 1.25}]
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields["fields"]["task"] = "finetune"
    manifest.write_text(json.dumps(fields))
    found = status_of(str(output))
    assert found.training == {"step": 3, "num_steps": 12, "loss": 1.5, "eval_loss": 1.25}
    assert found.share_done == 0.25
