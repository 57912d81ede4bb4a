"""Runs through a pool of workers on a real Ray: every row exactly once, whatever happens to workers and driver.

What a row, a column or an error is has tests without a pool beside this file.
"""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import ray.data
from echo_jobs import (
    NUM_ROWS,
    origins,
    rows_of,
    segue_process,
    shards_in,
    wait_for,
    write_input,
    write_job,
)
from fsspec.implementations.local import LocalFileSystem
from in_process import run, run_here, silent
from oracle import check_exact, echo_answer
from ready_jobs import ready_job
from tiny_models import tiny_model, tiny_tokenizer

from segue.pipeline.problems import WorkersFailed
from segue.pipeline.run.run import plan_job, run_job

# Ray's own code warns of itself; what it says of our calls stays an error.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")
PACKAGES = ("attention", "workers", "pipeline", "jobs")
SLOW = {"model": {"source": "echo:0.4"}, "workers": {"units_in_flight": 1}}


def check(folder: Path) -> None:
    answer = lambda row: echo_answer(row["prompt"], 6)  # noqa: E731
    check_exact(LocalFileSystem(), str(folder / "in"), str(folder / "out"), answer=answer)


def test_run_of_two_workers_is_exact(local_ray, tmp_path):
    job = write_job(write_input(tmp_path), workers={"min_size": 2, "max_size": 2})
    assert run(job).status == "done"
    check(tmp_path)


def test_run_more_workers_than_fit_still_ends(local_ray, tmp_path):
    job = write_job(write_input(tmp_path), workers={"min_size": 3, "max_size": 3, "threads": 64})
    assert run(job).status == "done"


def test_run_unit_may_take_longer_than_ray_waits_for_progress(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 1
    )  # half an hour by default
    job = write_job(write_input(tmp_path), model={"source": "echo:4"}, input={"path": "in", "limit": 5})
    assert run(job).status == "done"


@pytest.mark.chaos
def test_run_signal_while_planning_exits_143_although_ray_takes_the_signal_too(local_ray, tmp_path):
    job = write_job(write_input(tmp_path))
    with pytest.raises(SystemExit) as exited:
        run(job, say=lambda line: os.kill(os.getpid(), signal.SIGTERM))
    assert exited.value.code == 143
    assert not (tmp_path / "out" / "_job" / "manifest.json").exists()


@pytest.mark.chaos
def test_run_signal_between_units_drains_and_a_rerun_finishes(local_ray, tmp_path):
    job = write_job(write_input(tmp_path), **SLOW, output={"path": "out", "max_rows_per_file": 5})

    def terminate():
        wait_for(lambda: shards_in(tmp_path / "out"))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    lines: list[str] = []
    summary = run(job, say=lines.append)
    assert (summary.status, summary.exit_code) == ("interrupted", 143)
    assert 0 < summary.rows < NUM_ROWS
    assert any("interrupt again" in line for line in lines)
    assert signal.getsignal(signal.SIGTERM) is not None
    rest = run_here(job, "model.source=echo")
    assert (rest.status, rest.rows_this_run) == ("done", NUM_ROWS - summary.rows)
    check(tmp_path)


@pytest.mark.chaos
def test_run_worker_killed_in_the_middle_costs_nothing(local_ray, tmp_path):
    job = write_job(write_input(tmp_path), **SLOW, output={"path": "out", "max_rows_per_file": 5})

    def kill_worker():
        wait_for(lambda: shards_in(tmp_path / "out"))
        for pid in _pids_of("MapWorker(MapBatches(UnitWorker))"):
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_worker, daemon=True)
    killer.start()
    assert run(job).status == "done"
    killer.join()
    check(tmp_path)


def _pids_of(title: str) -> list[int]:
    """Processes of this test's own Ray with this title."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if title.encode() in (entry / "cmdline").read_bytes() and _has_ancestor(int(entry.name), os.getpid()):
                found.append(int(entry.name))
    assert found, f"no process has the title {title}"
    return found


def _has_ancestor(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


@pytest.mark.chaos
def test_run_driver_killed_half_way_from_a_folder_that_shadows_ours_and_rerun_has_every_row_once(tmp_path):
    folder = write_input(tmp_path)
    for name in PACKAGES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('the wrong package was imported')")
    job = write_job(folder, **SLOW, output={"path": "out", "max_rows_per_file": 5})
    with segue_process(folder, "run", job.name, "--quiet") as process:
        wait_for(lambda: len(shards_in(folder / "out")) >= 2, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(shards_in(folder / "out")) < 12
        # Workers of the dead run may still be at it.
        summary = run_here(job, "model.source=echo")
        assert summary.status == "done"
    assert set(rows_of(folder / "out")) == origins()
    assert not list((folder / "out").rglob(".tmp-*"))


def test_run_workers_whose_model_is_gone_fail_with_the_cause(local_ray, tmp_path, monkeypatch):
    folder = write_input(tmp_path)
    model = folder / "model"
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    monkeypatch.setenv("SEGUE_CACHE", str(folder / "cache"))
    ready = ready_job(write_job(folder, model={"source": str(model)}))
    plan_job(ready, silent)
    (model / "model.safetensors").unlink()
    with pytest.raises(WorkersFailed, match="safetensors") as failed:
        run_job(ready, silent, quiet=True)
    assert len(str(failed.value).splitlines()) == 1
