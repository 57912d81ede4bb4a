"""Plans of several windows: each row once, the next planned while one is run, another run's progress not taken for
damage."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from echo_jobs import origins, rows_of, wait_for, write_input, write_job
from fsspec.implementations.local import LocalFileSystem
from oracle import check_exact, echo_answer
from ray.util.placement_group import placement_group, remove_placement_group
from ready_jobs import ready_job

from segue.pipeline.dataset.blocks import InputChanged
from segue.pipeline.ledger.completeness import missing_units
from segue.pipeline.ledger.failed_rows import FailedRows
from segue.pipeline.ledger.manifest import LONGEST_ROWS, ForeignOutput, Manifest, load_manifest
from segue.pipeline.ledger.reading import finished_manifest
from segue.pipeline.ledger.totals import RunSummary
from segue.pipeline.ledger.units import UnitSpec, load_unit
from segue.pipeline.ledger.verify import verify
from segue.pipeline.plan import windows as planning
from segue.pipeline.processes.interrupt import Interrupt
from segue.pipeline.processes.ray_session import num_cluster_cpus
from segue.pipeline.processes.reservation import reserved_cpus
from segue.pipeline.ready.checks import CheckedJob
from segue.pipeline.ready.job import ReadyJob
from segue.pipeline.run import passes
from segue.pipeline.run.run import plan_job, run_job
from segue.pipeline.storage.folder import LocalStore
from segue.pipeline.storage.store import OutputStorageError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")
NUM_ROWS, WINDOW = 60, 25  # 30 rows a file: a window ends inside a file, one goes over two files
WINDOWS = [range(25), range(25, 50), range(50, 60)]


def window_job(folder: Path, **sections: Any) -> ReadyJob:
    return ready_job(write_job(folder, plan={"window_rows": WINDOW}, **sections))


def run(job: ReadyJob) -> tuple[RunSummary, list[str]]:
    said: list[str] = []
    return run_job(job, said.append, quiet=True), said


def check(folder: Path) -> None:
    answer = lambda row: echo_answer(row["prompt"], 6)  # noqa: E731
    check_exact(LocalFileSystem(), str(folder / "in"), str(folder / "out"), answer=answer)


@contextmanager
def without(path: Path) -> Iterator[None]:
    """For the time of the block the file is gone."""
    content = path.read_bytes()
    path.unlink()
    try:
        yield
    finally:
        path.write_bytes(content)


def places(checked: CheckedJob, number: int) -> list[int]:
    """The rows of a window, counted over both files."""
    first, second = checked.window(number)
    return [*first, *(30 + row for row in second)]


def test_windows_are_consecutive_rows_of_what_is_read(here, tmp_path):
    checked = window_job(write_input(tmp_path)).checked
    assert [places(checked, number) for number in range(checked.num_windows)] == [list(rows) for rows in WINDOWS]
    limited = ready_job(write_job(tmp_path, plan={"window_rows": 25}, input={"path": "in", "limit": 50})).checked
    assert (limited.num_windows, places(limited, 1)) == (2, list(range(25, 50)))
    failed = FailedRows("out", "f", "i", {"a.parquet": np.arange(0, 30, 2), "b.parquet": np.arange(1, 30, 2)})
    again = replace(checked, failed=failed)
    assert (again.num_rows, again.num_windows) == (30, 2)
    others = replace(failed, rows={**failed.rows, "a.parquet": np.arange(1, 30, 2)})
    assert (others.identity == failed.identity, replace(failed).identity == failed.identity) == (False, True)
    assert [places(again, 0), places(again, 1)] == [[*range(0, 30, 2), *range(31, 50, 2)], [*range(51, 60, 2)]]
    assert ready_job(write_job(tmp_path, input={"path": "in", "limit": 0})).checked.num_windows == 1


@pytest.fixture(scope="module")
def finished(local_ray, tmp_path_factory) -> tuple[Path, list[str]]:
    folder = write_input(tmp_path_factory.mktemp("windows"))
    summary, said = run(window_job(folder))
    assert (summary.status, summary.rows, summary.shards) == ("done", NUM_ROWS, 5)
    return folder, said


def test_each_row_is_there_once_in_a_shard_of_its_window(finished):
    folder, said = finished
    check(folder)
    manifest = load_manifest(LocalStore(folder / "out"))
    assert manifest is not None
    assert manifest.is_complete
    assert [unit.ordinal for unit in manifest.units] == [0, 1, 2, 3, 4]
    assert [unit.num_rows for unit in manifest.units] == [16, 9, 16, 9, 10]
    assert manifest.stats["num_rows"] == manifest.num_rows == NUM_ROWS
    assert set(rows_of(folder / "out")) == origins()
    assert [line.split(" as ")[0] for line in said if line.startswith("planned")] == [
        "planned 25 rows of 1 of 3 windows",
        "planned 50 rows of 2 of 3 windows",
        "planned 60 rows of 3 of 3 windows",
    ]
    assert verify(str(folder / "out")).status == "sound"


def test_a_window_is_planned_while_workers_that_fill_the_cluster_run_the_one_before_it(local_ray, tmp_path):
    job = window_job(write_input(tmp_path))
    manifest = planning.plan_first(job, lambda line: None)
    workers = placement_group([{"CPU": reserved_cpus(1, is_planning=True)}] * num_cluster_cpus())
    ray.get(workers.ready())
    try:
        with closing(planning.growing_plans(job, manifest, Interrupt(), lambda line: None)) as plans:
            next(plans)
            wait_for((tmp_path / "out/_job/windows/window-000001.json").exists)
    finally:
        remove_placement_group(workers)


def test_plan_that_was_interrupted_is_completed_from_there(finished, tmp_path):
    job = window_job(write_input(tmp_path))
    interrupt = Interrupt()
    first = planning.plan_first(job, lambda line: None)
    assert (first.num_planned, first.num_rows, first.is_complete) == (1, 25, False)
    assert verify(str(tmp_path / "out")).status == "incomplete"
    plans = planning.growing_plans(job, first, interrupt, lambda line: None)
    assert next(plans) == first
    grown = next(plans)
    assert (grown.num_planned, grown.num_rows) == (2, 50)
    interrupt.signum = 15
    assert list(plans) == []
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/_job").rglob("*") if path.is_file()}
    whole = plan_job(job, lambda line: None)
    assert whole.is_complete
    assert all(path.stat().st_mtime_ns == then for path, then in files.items())
    in_one_go = load_manifest(LocalStore(finished[0] / "out"))
    assert in_one_go is not None
    assert whole.stats == in_one_go.stats
    for name in ("num_rows", "tokens_requested", "tokens_distinct"):
        assert 0 < first.stats[name] < grown.stats[name] < whole.stats[name]
    longest = whole.stats["longest"]
    assert len(longest) == LONGEST_ROWS
    assert longest == sorted(longest, key=lambda pair: -pair[0])


def test_shards_of_a_window_that_another_run_planned_are_no_strangers(finished):
    folder, _ = finished
    store = LocalStore(folder / "out")
    manifest = Manifest.from_bytes(store.read("_job/manifest.json"))
    assert (manifest.num_planned, missing_units(store, manifest)) == (1, [])
    with pytest.raises(ForeignOutput, match="is not a shard of this job"):
        missing_units(store, replace(manifest, num_windows=1))


def test_input_that_changes_before_its_window_is_planned_is_refused(local_ray, tmp_path):
    folder = write_input(tmp_path)
    job = window_job(folder)
    manifest = planning.plan_first(job, lambda line: None)
    (folder / "in" / "b.parquet").write_bytes((folder / "in" / "a.parquet").read_bytes())
    plans = planning.growing_plans(job, manifest, Interrupt(), lambda line: None)
    next(plans)
    with pytest.raises(InputChanged, match=r"b\.parquet must be as it was planned"):
        next(plans)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"{", "is not a window of a plan"),
        (lambda content: content.replace(b'"fingerprint": "', b'"fingerprint": "0'), "is of job 0"),
        (lambda content: content.replace(b"num_rows", b"number_rows"), "is not a window of a plan"),
    ],
    ids=["half", "other-job", "other-version"],
)
def test_window_that_is_none_of_this_plan_is_refused_by_name(finished, tmp_path, change, message):
    folder, _ = finished
    store = LocalStore(tmp_path)
    store.create("_job/manifest.json", LocalStore(folder / "out").read("_job/manifest.json"))
    name = "_job/windows/window-000001.json"
    store.create(name, change(LocalStore(folder / "out").read(name)))
    with pytest.raises(ForeignOutput, match=f"window-000001.json {message}"):
        load_manifest(store)


def test_window_that_is_gone_after_the_job_was_done_is_said(finished):
    folder, _ = finished
    with without(folder / "out/_job/windows/window-000002.json"):
        with pytest.raises(OutputStorageError, match=r"window-000002\.json is gone although .*_SUCCESS"):
            run(window_job(folder))
        found = verify(str(folder / "out"))
    kinds = {(damage.kind, damage.path.rpartition("/")[2]) for damage in found.damages}
    assert ("plan", "window-000002.json") in kinds
    assert found.status == "damaged"
    assert run(window_job(folder))[0].status == "already_complete"


def test_window_size_belongs_to_the_job(finished):
    folder, _ = finished
    job = ready_job(write_job(folder, "other.yaml", plan={"window_rows": 30}))
    with pytest.raises(ForeignOutput, match=r"plan\.window_rows: there 25, here 30"):
        run(job)
    record = json.loads((folder / "out/_job/manifest.json").read_bytes())
    assert (record["num_windows"], len(record["units"])) == (3, 2)


def test_workers_leave_a_cpu_to_the_planner_while_there_is_more_to_plan():
    assert [reserved_cpus(threads, is_planning=False) for threads in (1, 2, 8)] == [1, 2, 8]
    assert [reserved_cpus(threads, is_planning=True) for threads in (1, 2, 8)] == [0.5, 1, 7]


def test_of_two_jobs_planned_at_once_the_later_takes_nothing_away_from_the_first(here, tmp_path):
    jobs = [window_job(write_input(tmp_path)), window_job(tmp_path, seed=1)]  # the same rows in the same units
    planned = planning.plan_next(jobs[0], None)
    with pytest.raises(ForeignOutput, match="seed: there 0, here 1"):
        planning.plan_next(jobs[1], None)
    store = LocalStore(tmp_path / "out")
    assert [load_unit(store, unit).num_rows for unit in planned.units] == [16, 9]
    assert len(store.names("_job/units")) == 2


def test_planners_of_one_job_end_with_one_plan_whoever_is_first(here, tmp_path):
    job = window_job(write_input(tmp_path))
    first = planning.plan_next(job, None)
    assert planning.plan_next(job, None) == first
    second = planning.plan_next(job, first)
    third = planning.plan_next(job, second)
    assert planning.plan_next(job, first) == third  # another was further already
    assert [unit.ordinal for unit in third.units] == [0, 1, 2, 3, 4]
    assert all(load_unit(job.store, unit).num_rows for unit in third.units)
    (tmp_path / "out" / "part-000009-x.parquet").write_bytes(b"")
    with pytest.raises(ForeignOutput, match="is not a shard"):
        missing_units(job.store, replace(third, num_windows=4))


def test_output_that_lost_a_window_is_not_complete_for_those_who_read_it(finished):
    folder, _ = finished
    with without(folder / "out/_job/windows/window-000001.json"), pytest.raises(ForeignOutput, match="not complete"):
        finished_manifest(str(folder / "out"))
    assert finished_manifest(str(folder / "out")).is_complete


def test_units_that_were_given_up_are_left_alone_when_more_is_planned(here, tmp_path):
    job = window_job(write_input(tmp_path))
    tried: list[list[int]] = []

    class NothingWorks(passes.Passes):
        def _round(self, units: Sequence[UnitSpec]) -> list[UnitSpec]:
            tried.append([unit.ordinal for unit in units])
            return list(units)

    nobody = NothingWorks(job, passes.Tally(0, 0), Interrupt(), lambda line: None, quiet=True)
    manifest = planning.plan_next(job, None)
    nobody.run(manifest)
    nobody.run(planning.plan_next(job, manifest))
    assert tried == [[0, 1], [2, 3]]
