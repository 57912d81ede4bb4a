"""`limits.max_error_rate`: errors of planning end a job before a worker starts, errors of workers while it runs. A job
within its limit runs through however its errors lie, and what ended early goes on."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo_jobs import rows_of, shards_in, write_job
from in_process import run_here

from segue.jobs.show.folder import show_summary
from segue.pipeline.ledger.manifest import SUCCESS
from segue.pipeline.ledger.reading import error_counts, error_rows

NO_ECHO = json.dumps({"structured_outputs": {"choice": ["a", "b"]}})  # an echo answers such a row with BAD_PARAMS
ROWS_PER_UNIT = 200


def write_rows(folder, num_rows, *, null=(), failing=(), **sections):
    """A job whose rows `null` have no prompt and whose rows `failing` fail in the worker, planned in this order."""
    (folder / "in").mkdir()
    prompts = [None if n in set(null) else f"p{n:06}" for n in range(num_rows)]
    own = [NO_ECHO if n in set(failing) else None for n in range(num_rows)]
    table = pa.table({"prompt": prompts, "sampling_params": pa.array(own, pa.string())})
    pq.write_table(table, folder / "in" / "a.parquet")
    output = {"path": "out", "max_rows_per_file": ROWS_PER_UNIT}
    return write_job(folder, output=output, prompt={"format": "text", "text": "{prompt}"}, **sections)


def test_errors_of_planning_over_the_limit_end_the_job_before_a_worker_starts(tmp_path, capsys):
    job = write_rows(tmp_path, 2400, null=range(0, 2400, 6))
    for _ in range(2):
        summary = run_here(job)
        assert (summary.status, summary.exit_code) == ("too_many_errors", 3)
        assert summary.errors_planned == {"NULL_PROMPT": 400}
        assert "planning found an error in 400 of the job's 2,400 rows" in summary.reason
        assert not shards_in(tmp_path / "out")
    show_summary(summary)
    assert "400 NULL_PROMPT" in capsys.readouterr().out
    assert run_here(job, "limits.max_error_rate=0.5").exit_code == 0
    assert len(rows_of(tmp_path / "out")) == 2400


def test_errors_that_planning_found_are_listed_before_their_rows_are_written(tmp_path):
    run_here(write_rows(tmp_path, 2400, null=range(0, 2400, 6)))
    assert error_counts(str(tmp_path / "out")) == {"NULL_PROMPT": 400}
    assert [row["src_row"] for row in error_rows(str(tmp_path / "out"), 3)] == [0, 6, 12]


def test_job_within_its_limit_runs_through_though_its_first_unit_holds_errors_alone(tmp_path):
    """8,000 rows, 3% of them null, limit 5%: they are planned first, into units of their own."""
    summary = run_here(write_rows(tmp_path, 8000, null=range(0, 8000, 33)))
    assert (summary.status, summary.exit_code, summary.reason) == ("done", 0, "")
    assert summary.errors == summary.errors_planned == {"NULL_PROMPT": 243}


@pytest.mark.parametrize(
    "failing",
    [range(150), range(2000, 2150), range(3850, 4000), range(0, 4000, 27)],
    ids=["first", "middle", "last", "even"],
)
def test_job_within_its_limit_runs_through_wherever_workers_find_its_errors(tmp_path, failing):
    summary = run_here(write_rows(tmp_path, 4000, failing=failing))
    assert (summary.status, summary.exit_code) == ("done", 0)
    assert summary.errors == {"BAD_PARAMS": len(failing)}


def test_job_that_is_certain_to_be_over_its_limit_ends_at_that_unit(tmp_path):
    """Of 3,000 rows 150 may have an error. Planning found 100, half of the first unit, which has 60 more."""
    job = write_rows(tmp_path, 3000, null=range(2900, 3000), failing=range(60))
    summary = run_here(job)
    assert (summary.status, summary.exit_code, summary.rows) == ("too_many_errors", 3, ROWS_PER_UNIT)
    assert "an error in 160 of the job's 3,000 rows" in summary.reason
    assert not (tmp_path / "out" / SUCCESS).exists()
    assert run_here(job).rows_this_run == 0
    assert run_here(job, "limits.max_error_rate=0.06").status == "done"


def test_errors_that_an_earlier_run_committed_count_against_the_limit(tmp_path):
    job = write_rows(tmp_path, 2000, failing=range(101))
    run_here(job, "limits.max_error_rate=1")
    (tmp_path / "out" / SUCCESS).unlink()
    shards_in(tmp_path / "out")[-1].unlink()
    summary = run_here(job)
    assert (summary.status, summary.rows_this_run) == ("too_many_errors", 0)


def test_run_that_answers_no_row_at_all_ends_early_and_the_next_one_tries_others(tmp_path):
    """Of 4,000 rows 2,000 may fail, so 1,300 that fail at the beginning do not end the job for good."""
    job = write_rows(tmp_path, 4000, failing=range(1300), limits={"max_error_rate": 0.5})
    first = run_here(job)
    assert (first.status, first.exit_code, first.rows) == ("incomplete", 3, 5 * ROWS_PER_UNIT)
    assert "computed 1,000 rows and not one of them was answered" in first.reason
    assert (run_here(job).status, len(rows_of(tmp_path / "out"))) == ("done", 4000)


def test_run_of_a_job_without_a_limit_goes_on_whatever_fails(tmp_path):
    job = write_rows(tmp_path, 2400, failing=range(2400), limits={"max_error_rate": 1.0})
    assert run_here(job).status == "done"


def test_errors_of_a_window_are_judged_against_the_whole_job(tmp_path):
    """The first of four windows is over the limit, the job is not."""
    job = write_rows(tmp_path, 4000, null=range(150), plan={"window_rows": 1000})
    assert run_here(job).status == "done"


def test_errors_of_a_later_window_end_the_job_before_its_rows_are_computed(tmp_path):
    summary = run_here(write_rows(tmp_path, 4000, null=range(1000, 1300), plan={"window_rows": 1000}))
    assert (summary.status, summary.rows) == ("too_many_errors", 1000)
    assert summary.errors_planned == {"NULL_PROMPT": 300}
