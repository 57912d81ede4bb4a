"""Plans of few rows, made without Ray: the same as those that Ray makes, and Ray's where there is more than said."""

import signal
from contextlib import contextmanager
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo_jobs import write_input, write_job
from ready_jobs import ready_job

from segue.pipeline.plan import order as ordering
from segue.pipeline.plan.order import needs_ray, sorted_rows
from segue.pipeline.problems import WorkersFailed
from segue.pipeline.prompts.rows import PlannedRowReader, PreparationFailed
from segue.pipeline.ready.job import today
from segue.pipeline.run.run import plan_job

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")


@pytest.fixture
def job(tmp_path):
    return ready_job(write_job(write_input(tmp_path), output={"path": "out", "max_rows_per_file": 7}))


def by_ray_only(monkeypatch):
    monkeypatch.setattr(ordering, "FEW_ROWS", 0)


def test_plan_of_few_rows_starts_no_ray(job, monkeypatch):
    monkeypatch.setattr(ordering.ray_session, "_start", lambda num_cpus: pytest.fail("Ray was started"))
    assert plan_job(job, lambda line: None).num_rows == job.checked.num_rows


def test_plan_is_the_same_with_and_without_ray(job, local_ray, tmp_path, monkeypatch):
    here = plan_job(job, lambda line: None)
    by_ray_only(monkeypatch)
    by_ray = plan_job(
        ready_job(tmp_path / "job.yaml", f"output.path={tmp_path / 'other'}"),
        lambda line: None,
    )
    assert [unit.unit_id for unit in here.units] == [unit.unit_id for unit in by_ray.units]
    assert here.stats == by_ray.stats
    assert len(here.units) > 1


@pytest.mark.parametrize("limit", ["FEW_ROWS", "FEW_BYTES", "FEW_PIECES"])
def test_more_rows_bytes_or_pieces_are_for_ray(job, monkeypatch, limit):
    spec = job.render_spec(today())
    assert not needs_ray(job.checked, spec)
    monkeypatch.setattr(ordering, limit, 1)
    assert needs_ray(job.checked, spec)


def test_many_small_files_are_planned_without_ray_unless_each_is_a_request_to_a_bucket(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(100):
        pq.write_table(pa.table({"prompt": [f"row {n}"]}), tmp_path / "in" / f"{n:03}.parquet")
    ready = ready_job(write_job(tmp_path))
    spec = ready.render_spec(today())
    assert not needs_ray(ready.checked, spec)
    assert plan_job(ready, lambda line: None).num_rows == 100
    there = tuple(replace(file, path=f"s3://bucket/{file.src_path}") for file in ready.checked.inputs)
    assert needs_ray(replace(ready.checked, inputs=there), spec)


def test_ray_that_starts_in_the_middle_of_a_plan_takes_no_signal(job, monkeypatch):
    @contextmanager
    def taking_session():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        yield

    seen = []
    monkeypatch.setattr(ordering.ray_session, "ray_session", taking_session)
    monkeypatch.setattr(
        ordering.ray.data, "read_datasource", lambda _: seen.append(signal.getsignal(signal.SIGTERM)) or pytest.skip()
    )
    before = signal.getsignal(signal.SIGTERM)
    by_ray_only(monkeypatch)
    with pytest.raises(pytest.skip.Exception):
        list(sorted_rows(job.checked, job.render_spec(today()), 0))
    assert seen == [before]


def test_rows_that_are_larger_than_their_footer_says_are_given_to_ray(job, monkeypatch):
    monkeypatch.setattr(ordering, "HELD_BYTES", 1)
    by_ray = pa.table({"made by": ["Ray"]})
    monkeypatch.setattr(ordering, "_sorted_by_ray", lambda source: iter([by_ray]))
    assert list(sorted_rows(job.checked, job.render_spec(today()), 0)) == [by_ray]


@pytest.mark.parametrize("kind", [PreparationFailed, ValueError])
def test_rows_that_cannot_be_made_ready_fail_as_in_a_worker(job, monkeypatch, kind):
    def failing(self, *_):
        raise kind("each row ends it\nat once")

    monkeypatch.setattr(PlannedRowReader, "read", failing)
    with pytest.raises(WorkersFailed, match=rf"^{kind.__name__}: each row ends it \.\.\. at once$"):
        list(sorted_rows(job.checked, job.render_spec(today()), 0))
