"""Where the plan is cut into units, and so the output into files: by rows, and by bytes."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo_jobs import write_job
from in_process import silent
from ready_jobs import ready_job

from segue.pipeline.run.run import plan_job

NUM_ROWS, ROW_BYTES = 40, 4000


@pytest.fixture
def sizes(here, tmp_path):
    """How many rows the units have, for a section `output` of a job whose rows are of equal size."""
    (tmp_path / "in").mkdir()
    rows = {"prompt": [f"{n:04}" for n in range(NUM_ROWS)], "note": ["x" * ROW_BYTES] * NUM_ROWS}
    pq.write_table(pa.table(rows), tmp_path / "in" / "a.parquet")

    def of(**output: int) -> list[int]:
        job = write_job(tmp_path, prompt={"format": "text"}, output={"path": "out", **output})
        return [unit.num_rows for unit in plan_job(ready_job(job), silent).units]

    return of


def test_units_have_as_many_rows_as_are_allowed(sizes):
    assert sizes(max_rows_per_file=16) == [16, 16, 8]


def test_units_have_no_more_bytes_than_are_allowed(sizes):
    """A unit also holds prompts and where rows come from, so fewer rows fit than ten."""
    found = sizes(max_bytes_per_file=10 * ROW_BYTES)
    assert sum(found) == NUM_ROWS
    assert 1 < max(found) < 10


def test_row_that_is_larger_than_a_file_may_be_is_a_unit_of_its_own(sizes):
    assert sizes(max_bytes_per_file=ROW_BYTES // 2) == [1] * NUM_ROWS
