"""The matrix of bad inputs: jobs that are refused by name, rows that cost themselves, files that no writer makes.

The same tables are printed by `make script RUN=tests/faults/bad_inputs.py`.
"""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad.cases import Case, is_expected, job, outcome_of
from bad.jobs import CASES
from bad.parquet import BAD_FILES, GOOD, GOOD_DICTIONARY, TEXTS
from bad.rows import DATASETS, NEED_CHILDREN, SLOW_DATASETS, TEXT, errors_in, types
from bad.score_rows import SCORE_DATASETS
from in_process import run, run_here, without_ray
from render_specs import render_spec

from segue.pipeline.dataset.files import discover
from segue.pipeline.problems import JobRefused
from segue.pipeline.prompts.rows import PlannedRowReader, RowLimits


@pytest.fixture(autouse=True)
def _tiny_model(model_directory, monkeypatch):
    monkeypatch.setenv("SEGUE_TINY_MODEL", model_directory)


@pytest.mark.parametrize("each", CASES, ids=lambda each: f"{each.number} {each.what}")
def test_bad_job_is_refused_by_name(each: Case, tmp_path):
    got = outcome_of(each, tmp_path)
    assert is_expected(each, got), got


def test_every_number_of_the_jobs_matrix_has_a_case():
    elsewhere = {"C22"}  # buckets: tests/pipeline/run/test_run_s3.py, tests/pipeline/storage/test_object_store.py
    assert {each.number for each in CASES} | elsewhere == {f"C{number}" for number in range(1, 37)}


def test_every_number_of_the_rows_matrix_has_a_row():
    elsewhere = {"R25"}  # fewer rows than the footer says: ARROW-GH-41317 below
    numbers = {row.number for make in [*DATASETS, *SCORE_DATASETS, *SLOW_DATASETS] for row in make().rows} - {"-"}
    assert numbers | elsewhere == {f"R{number}" for number in range(1, 36)}


@pytest.mark.parametrize("make", [*DATASETS, *SCORE_DATASETS], ids=lambda make: make.__name__)
def test_bad_rows_cost_themselves(make, tmp_path):
    dataset = make()
    with without_ray():
        summary = (run if make in NEED_CHILDREN else run_here)(dataset.write(tmp_path))
    assert (summary.status, summary.exit_code) == ("done", 0)
    assert errors_in(tmp_path / "out") == dataset.codes
    table = pq.read_table(tmp_path / "out")
    answers = dict(zip(table["src_row"].to_pylist(), table[dataset.answer].to_pylist(), strict=True))
    assert all((answers[number] is None) == (code is not None) for number, code in dataset.codes.items())


def test_types_that_are_only_passed_through_come_out_bit_equal(tmp_path):
    run_here(types().write(tmp_path))
    given = pq.read_table(tmp_path / "in" / "a.parquet")
    (shard,) = (tmp_path / "out").glob("part-*.parquet")
    got = pq.read_table(shard).sort_by("src_row").select(given.column_names)
    assert got.schema.remove_metadata() == given.schema.remove_metadata()
    for name in given.column_names:
        if name != "float":
            assert got[name].combine_chunks().equals(given[name].combine_chunks()), name
    bits = [table["float"].combine_chunks().view(pa.int64()) for table in (given, got)]
    assert bits[0].equals(bits[1])


OUTCOMES = {
    "PARQUET-1481": "refused",
    "ARROW-RS-GH-6229-DICTHEADER": ["INPUT_CORRUPT"] * 4,
    "ARROW-RS-GH-6229-LEVELS": ["INPUT_CORRUPT"] * 4,
    "ARROW-GH-41321": ["INPUT_CORRUPT"] * 4,
    "ARROW-GH-41317": [None] * 4 + ["INPUT_CORRUPT"] * 3,
    "ARROW-GH-43605": [None] * 4,  # odd, and valid
    "ARROW-GH-45185": ["INPUT_CORRUPT"] * 4,
    "ARROW-GH-47662": [None, None, "INPUT_CORRUPT", "INPUT_CORRUPT"],
    "an index": [None, None, "INPUT_CORRUPT", "INPUT_CORRUPT"],
    "an unknown page": ["INPUT_CORRUPT"] * 4,
    "an unknown encoding": ["INPUT_CORRUPT"] * 4,
    "fewer than none": ["INPUT_CORRUPT"] * 4,
    "a long text": ["INPUT_CORRUPT"] * 4,
    "a negative text": ["INPUT_CORRUPT"] * 4,
    "no pages": ["INPUT_CORRUPT"] * 4,
    "more values": [None] * 4,
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_malformed_file_is_refused_or_costs_the_rows_that_cannot_be_read(name, tmp_path):
    path = tmp_path / f"{name}.parquet"
    path.write_bytes(BAD_FILES[name][1].content())
    assert outcome_of_file(path) == OUTCOMES[name], BAD_FILES[name][0]


def test_short_column_costs_its_row_groups_and_moves_no_row(tmp_path):
    """Of 7 rows that each of three row groups has there are 4 values."""
    (tmp_path / "in").mkdir()
    file = replace(BAD_FILES["ARROW-GH-41317"][1], num_groups=3)
    (tmp_path / "in" / "a.parquet").write_bytes(file.content())
    run_here(job(tmp_path, limits={"max_error_rate": 1.0}, **TEXT))
    rows = {row["src_row"]: row["prompt"] for row in pq.read_table(tmp_path / "out").to_pylist()}
    assert [rows[number] for number in range(21)] == [*TEXTS, None, None, None] * 3
    codes = errors_in(tmp_path / "out")
    assert [codes[number] for number in range(21)] == ([None] * 4 + ["INPUT_CORRUPT"] * 3) * 3


@pytest.mark.parametrize("file", [GOOD, GOOD_DICTIONARY], ids=["plain", "dictionary"])
def test_files_put_together_by_hand_are_sound_where_nothing_is_wrong(file, tmp_path):
    (tmp_path / "a.parquet").write_bytes(file.content())
    assert pq.read_table(tmp_path / "a.parquet")["prompt"].to_pylist() == TEXTS
    assert outcome_of_file(tmp_path / "a.parquet") == [None] * 4


def outcome_of_file(path) -> str | list[str | None]:
    """What becomes of a file whose one column is passed through: of each row its error, or what ends the job."""
    try:
        (file,) = discover([str(path)])
    except JobRefused:
        return "refused"
    spec = render_spec(
        prompt_columns=(), passed_columns=("prompt",), template=render_spec().template.model_copy(update={"text": "x"})
    )
    reader = PlannedRowReader(pa.schema([file.schema.field("prompt")]), spec, RowLimits(20, 2**28))
    rows = pa.concat_tables(reader.read(file, 0, file.num_rows, range(file.num_rows))).to_pylist()
    assert [row["src_row"] for row in rows] == list(range(file.num_rows))
    return [row["error"] and row["error"]["code"] for row in rows]
