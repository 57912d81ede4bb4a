"""`limits.max_error_rate`: a run over it stops, also when the errors are of a run before it."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo_jobs import rows_of, shards_in, write_job
from in_process import run_here

from segue.pipeline.ledger.manifest import SUCCESS

NUM_ROWS, NUM_ERRORS, ROWS_PER_UNIT = 2400, 400, 600


@pytest.fixture
def job(tmp_path):
    """Four units; rows without a prompt are planned first, so the first unit holds all errors."""
    (tmp_path / "in").mkdir()
    prompts = [None if n % 6 == 0 else f"p{n}" for n in range(NUM_ROWS)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in" / "a.parquet")
    return write_job(tmp_path, output={"path": "out", "max_rows_per_file": ROWS_PER_UNIT})


def test_run_over_the_error_limit_stops_with_3_until_the_limit_is_raised(job, tmp_path):
    for _ in range(2):
        summary = run_here(job)
        assert (summary.status, summary.exit_code) == ("too_many_errors", 3)
        assert not (tmp_path / "out" / SUCCESS).exists()
    assert run_here(job, "limits.max_error_rate=0.5").exit_code == 0
    assert len(rows_of(tmp_path / "out")) == NUM_ROWS


def test_workers_are_told_to_stop_when_a_receipt_passes_the_limit(job, tmp_path):
    """Two units make enough rows to tell; the other two are not computed."""
    summary = run_here(job)
    assert (summary.rows, summary.num_errors) == (2 * ROWS_PER_UNIT, NUM_ERRORS)
    assert len(shards_in(tmp_path / "out")) == 2


def test_errors_that_an_earlier_run_committed_count_against_the_limit(job, tmp_path):
    run_here(job, "limits.max_error_rate=1")
    (tmp_path / "out" / SUCCESS).unlink()
    shards_in(tmp_path / "out")[-1].unlink()
    summary = run_here(job)
    assert (summary.status, summary.rows_this_run) == ("too_many_errors", 0)
