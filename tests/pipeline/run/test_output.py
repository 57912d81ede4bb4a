"""What a finished run leaves: every row once, with its columns and its answer. What later runs make of the folder."""

import json
import os
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from echo_jobs import (
    NUM_ROWS,
    ROWS_PER_FILE,
    answers,
    awkward_table,
    origins,
    rows_of,
    shards_in,
    write_input,
    write_job,
)
from in_process import run, run_here, without_children

from segue.pipeline.ledger.columns import RESULT_COLUMNS
from segue.pipeline.ledger.manifest import SUCCESS, ForeignOutput
from segue.pipeline.storage.folder import LocalStore
from segue.pipeline.storage.store import OutputStorageError


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder with a finished run; tests leave it as it is."""
    folder = write_input(tmp_path_factory.mktemp("done"))
    assert run_here(write_job(folder)).status == "done"
    return folder


def test_run_every_input_row_is_in_the_output_exactly_once(done):
    assert set(rows_of(done / "out")) == origins()
    sizes = [pq.read_metadata(path).num_rows for path in shards_in(done / "out")]
    assert sizes == [ROWS_PER_FILE, ROWS_PER_FILE, ROWS_PER_FILE, NUM_ROWS - 3 * ROWS_PER_FILE]


def test_run_input_columns_come_out_bit_equal_with_their_types(done):
    table = pa.concat_tables([pq.read_table(path) for path in shards_in(done / "out")])
    wanted = pa.concat_tables([pq.read_table(path) for path in sorted((done / "in").iterdir())])
    assert wanted.num_rows == NUM_ROWS
    for field in wanted.schema:
        assert table.schema.field(field.name).type == field.type, field.name
        values = dict(
            zip(table["id"].to_pylist(), table[field.name].to_pylist(), strict=True)
        )  # views cannot be sorted
        assert repr([values[n] for n in range(NUM_ROWS)]) == repr(wanted[field.name].to_pylist()), field.name


def test_run_result_columns_are_the_documented_ones(done):
    table = pq.read_table(shards_in(done / "out")[0])
    own = [name for name in table.column_names if name not in awkward_table(0, 1).column_names]
    optional = {"num_truncated_tokens", "logprobs", "reasoning_text", "samples"}
    assert set(own) == set(RESULT_COLUMNS["generate"]) - optional
    assert set(table["finish_reason"].to_pylist()) == {"length"}
    assert set(table["num_generated_tokens"].to_pylist()) == {6}
    for row in table.to_pylist():
        assert f"{row['prompt']}\nassistant\n".endswith(row["generated_text"])


def test_run_is_done_although_its_folder_is_listed_as_it_was_a_minute_ago(tmp_path, monkeypatch):
    """As NFS may list it: no shard that a worker elsewhere has published is in the listing yet."""
    names = LocalStore.names
    late = lambda store, folder="": [name for name in names(store, folder) if not name.startswith("part-")]  # noqa: E731
    monkeypatch.setattr(LocalStore, "names", late)
    summary = run_here(write_job(write_input(tmp_path)))
    assert (summary.status, summary.rows, summary.rows_this_run) == ("done", NUM_ROWS, NUM_ROWS)
    assert set(rows_of(tmp_path / "out")) == origins()


def test_run_success_file_lists_every_shard_with_its_size(done):
    record = json.loads((done / "out" / SUCCESS).read_text())
    assert record["rows"] == NUM_ROWS
    listed = {(shard["name"], shard["bytes"]) for shard in record["shards"]}
    assert listed == {(path.name, path.stat().st_size) for path in shards_in(done / "out")}


def test_run_again_does_nothing_and_says_so_without_ray(done, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: pytest.fail("Ray was looked for"))
    before = {path: path.stat().st_mtime_ns for path in (done / "out").rglob("*")}
    with without_children():
        summary = run(done / "job.yaml")
    assert (summary.status, summary.exit_code, summary.rows, summary.rows_this_run) == ("already_complete", 0, 60, 0)
    assert {path: path.stat().st_mtime_ns for path in (done / "out").rglob("*")} == before


def test_run_with_another_mask_in_the_same_folder_is_refused_by_name(done):
    with pytest.raises(ForeignOutput, match='mask: there "causal", here "segment"'):
        run_here(done / "job.yaml", "mask=segment")


def test_run_limit_gives_the_same_answers_as_the_same_rows_of_the_full_run(done):
    summary = run_here(done / "job.yaml", "input.limit=37", "output.path=limited")
    assert summary.rows == 37
    limited, full = answers(done / "limited"), answers(done / "out")
    assert set(limited) == {("a.parquet", n) for n in range(30)} | {("b.parquet", n) for n in range(7)}
    assert limited == {key: full[key] for key in limited}


def test_run_shard_gone_after_success_is_told_and_not_passed_over(tmp_path):
    job = write_job(write_input(tmp_path))
    run_here(job)
    lost = shards_in(tmp_path / "out")[1]
    lost.unlink()
    with pytest.raises(OutputStorageError, match=lost.name):
        run_here(job)
    (tmp_path / "out" / SUCCESS).unlink()
    assert run_here(job).rows_this_run == ROWS_PER_FILE
    assert set(rows_of(tmp_path / "out")) == origins()


@pytest.mark.parametrize("foreign", ["other.parquet", "data/other.parquet"])
def test_run_into_a_folder_with_foreign_files_is_refused(tmp_path, foreign):
    job = write_job(write_input(tmp_path))
    (tmp_path / "out" / foreign).parent.mkdir(parents=True)
    (tmp_path / "out" / foreign).write_text("theirs")
    with pytest.raises(ForeignOutput, match=foreign.split("/")[0]):
        run_here(job)


def test_run_foreign_file_beside_our_shards_is_refused(done, tmp_path):
    foreign = done / "out" / "part-000000-0.parquet"
    foreign.write_text("theirs")
    success = (done / "out" / SUCCESS).rename(tmp_path / SUCCESS)
    try:
        with pytest.raises(ForeignOutput, match=foreign.name):
            run_here(done / "job.yaml")
    finally:
        foreign.unlink()
        success.rename(done / "out" / SUCCESS)


def test_run_without_rows_is_complete_without_a_shard(tmp_path):
    job = write_job(write_input(tmp_path), input={"path": "in", "limit": 0})
    assert (run_here(job).status, run_here(job).status) == ("done", "already_complete")
    assert shards_in(tmp_path / "out") == []
    assert json.loads((tmp_path / "out" / SUCCESS).read_text())["rows"] == 0


def test_run_that_was_interrupted_while_planning_leaves_no_plan_and_the_next_plans_anew(tmp_path):
    job = write_job(write_input(tmp_path))
    with pytest.raises(SystemExit) as exited:
        run_here(job, say=lambda line: os.kill(os.getpid(), signal.SIGTERM))
    assert exited.value.code == 143
    assert not (tmp_path / "out" / "_job" / "manifest.json").exists()
    stale = tmp_path / "out" / "_job" / "units" / "unit-000000-0000000000000000.parquet"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.write_text("of a plan that was never finished")
    assert run_here(job).status == "done"
    assert set(rows_of(tmp_path / "out")) == origins()
