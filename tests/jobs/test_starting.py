"""How a run starts: what is looked at first, what goes on meanwhile, and what ends when it is refused or stopped."""

import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml_job
from echo_jobs import write_input, write_job
from ready_jobs import config_of, ready_job

from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.problems import JobRefused
from segue.pipeline.run.run import ray_ahead
from segue.workers.devices.gpus import may_be_there

ROOT = Path(__file__).parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def strange_model(tmp_path, model_directory) -> str:
    """Of a kind that is unknown."""
    shutil.copytree(model_directory, tmp_path / "strange")
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "unheard-of"}')
    return str(tmp_path / "strange")


def write_model_job(folder: Path, source: str) -> Path:
    pq.write_table(pa.table({"prompt": ["one", "two"]}), folder / "rows.parquet")
    job = {
        "name": "small",
        "model": {"source": source},
        "input": {"path": "rows.parquet"},
        "prompt": {"format": "text"},
        "sampling_params": {"max_tokens": 2},
        "output": {"path": "out"},
    }
    return yaml_job.write(folder, job)


@pytest.mark.skipif(may_be_there(), reason="with a card here the driver asks torch what it can")
def test_a_run_imports_neither_torch_nor_transformers_beside_its_workers(tmp_path, model_directory):
    """Importing them takes longer than all else that the driver does."""
    job = write_model_job(tmp_path, model_directory)
    result = python(f"""
import sys
from segue.jobs.commands.running import run_file
ready, summary = run_file({str(job)!r}, [], quiet=True)
print(ready.facts.dtype, summary.status, [name for name in ("torch", "transformers") if name in sys.modules])
""")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split(maxsplit=1)[1].strip() == "done []"


def test_meanwhile_is_called_once_data_is_right_and_before_the_model_is_loaded(tmp_path, strange_model):
    called: list[JobConfig] = []
    ready = ready_job(write_model_job(tmp_path, "echo"), meanwhile=called.append)
    assert called == [ready.config]
    write_model_job(tmp_path, strange_model)
    with pytest.raises(JobRefused, match="unheard-of"):
        ready_job(tmp_path / "job.yaml", meanwhile=called.append)
    assert len(called) == 2
    with pytest.raises(JobRefused, match=r"unheard-of(.|\n)*input\.path"):
        ready_job(tmp_path / "job.yaml", "input.path=nowhere", meanwhile=called.append)
    for change in ("model.source=./nowhere", "workers.num_gpus=1", "input.path=nowhere"):
        with pytest.raises(JobRefused, match=change.split("=")[0].split(".")[0]):
            ready_job(tmp_path / "job.yaml", change, meanwhile=called.append)
    assert len(called) == 2


FILTERED = "input.filters=[[prompt, ==, one]]"


def test_what_is_wrong_with_a_model_is_told_before_filters_read_the_data(tmp_path, strange_model, monkeypatch):
    monkeypatch.setattr("segue.pipeline.ready.job.selected_rows", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(JobRefused, match="unheard-of"):
        ready_job(write_model_job(tmp_path, strange_model), FILTERED)


def test_ray_is_not_started_ahead_of_filters_for_which_it_would_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("segue.pipeline.processes.ray_session.ray_session", lambda: pytest.fail("Ray was started"))
    with ray_ahead(config_of(write_model_job(tmp_path, "echo"), FILTERED)):
        pass


def test_ray_that_does_not_start_hides_no_problem_of_the_model(tmp_path, strange_model):
    job = write_model_job(tmp_path, strange_model)
    result = python(f"""
import ray
from segue.jobs.commands.running import run_file
def fail(**options):
    raise RuntimeError("no room for Ray here")
ray.init = fail
for source in ({strange_model!r}, "echo"):
    try:
        run_file({str(job)!r}, [f"model.source={{source}}"], quiet=True)
    except Exception as error:
        print(type(error).__name__)
""")
    assert (result.returncode, result.stdout.split()) == (0, ["JobRefused", "ClusterUnavailable"]), result.stderr


def test_submitted_job_joins_its_cluster_when_all_is_looked_at(tmp_path, monkeypatch):
    """Ray (2.60) may unpack its folder again when it does, in another's place, while a child still stands there."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("segue.pipeline.processes.ray_session.ray_session", lambda: pytest.fail("joined before"))
    with ray_ahead(config_of(write_model_job(tmp_path, "echo"))):
        pass


@pytest.mark.parametrize(("signum", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signal_while_ray_starts_is_told_by_its_number(tmp_path, signum, code):
    job = write_model_job(tmp_path, "echo")
    result = python(f"""
import os, signal
import ray
from segue.jobs.commands.running import run_file
def interrupted(**options):
    if signal.{signum} == signal.SIGTERM:  # as Ray does
        signal.signal(signal.SIGTERM, lambda number, frame: exit(number))
    os.kill(os.getpid(), signal.{signum})
ray.init = interrupted
run_file({str(job)!r}, [], quiet=True)
""")
    assert result.returncode == code, result.stderr


def test_ray_that_was_started_ahead_ends_with_a_job_that_is_refused(tmp_path, strange_model):
    job = write_model_job(tmp_path, strange_model)
    result = python(f"""
import ray
import segue.pipeline.ready.model as checking
from segue.jobs.commands.running import run_file
from segue.pipeline.problems import JobRefused
was_there = []
look = checking.inspect_model
checking.inspect_model = lambda *args, **more: was_there.append(ray.is_initialized()) or look(*args, **more)
try:
    run_file({str(job)!r}, [], quiet=True)
except JobRefused as refused:
    print(was_there, ray.is_initialized(), "unheard-of" in str(refused))
""")
    assert (result.returncode, result.stdout.strip()) == (0, "[True] False True"), result.stderr


def test_signal_while_the_model_is_looked_at_ends_ray_and_tells_its_number(tmp_path, model_directory):
    job = write_model_job(tmp_path, model_directory)
    result = python(f"""
import atexit, os, signal
import psutil
import segue.pipeline.ready.model as checking
from segue.jobs.commands.running import run_file
def report():
    print([child.name() for child in psutil.Process().children() if child.name() in ("raylet", "gcs_server")])
atexit.register(report)
checking.inspect_model = lambda *args, **more: os.kill(os.getpid(), signal.SIGTERM)
run_file({str(job)!r}, [], quiet=True)
""")
    assert (result.returncode, result.stdout.strip()) == (143, "[]"), result.stderr


def test_output_that_is_complete_needs_no_ray(tmp_path):
    job = write_job(write_input(tmp_path))
    code = f"""
import ray
from segue.jobs.commands.running import run_file
from segue.pipeline.processes import ray_session
sessions = []
session = ray_session.ray_session
ray_session.ray_session = lambda *args: sessions.append(1) or session(*args)
for _ in range(2):
    print(run_file({str(job)!r}, [], quiet=True)[1].status, len(sessions))
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["done 2", "already_complete 2"]
