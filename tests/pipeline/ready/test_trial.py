"""Some rows are tried before anything starts: a prompt that fits none is refused, single rows cost themselves."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo_jobs import write_input, write_job
from ready_jobs import ready_job
from render_specs import LOOPS

from segue.pipeline.problems import JobRefused
from segue.pipeline.ready import job, trial
from segue.pipeline.ready.child import checking_child
from segue.pipeline.ready.job import ReadyJob
from segue.pipeline.run.run import plan_job


def over(folder: Path, *files: list[str | None], **sections: Any) -> ReadyJob:
    """Over files a, b, ... with these prompts."""
    (folder / "in").mkdir()
    for name, prompts in zip("abcdef", files, strict=False):
        pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string())}), folder / "in" / f"{name}.parquet")
    return ready_job(write_job(folder, **sections))


def test_large_job_whose_tried_rows_all_fail_is_refused(tmp_path):
    with pytest.raises(JobRefused) as refused:
        over(tmp_path, [None] * 600, [None] * 600)
    assert str(refused.value).startswith(
        "prompt: got an error in each of 64 rows that were tried, the first NULL_PROMPT"
    )
    assert "of a.parquet" in str(refused.value)


@pytest.mark.parametrize(
    ("files", "sections"),
    [
        ([[None] * 999], {}),
        ([[None] * 1000], {"limits": {"max_error_rate": 1}}),
        ([[None] * 1000], {"limits": {"max_error_rate": 0.9}}),
        ([[None] * 1000], {"input": {"path": "in", "limit": 300}}),
    ],
    ids=["small", "errors-wanted", "a-tenth-is-enough", "limited"],
)
def test_jobs_that_errors_do_not_stop_are_told_what_failed(tmp_path, files, sections):
    trial = over(tmp_path, *files, **sections).trial
    assert len(trial.errors) == trial.num_rows == 64
    assert all(error.startswith("NULL_PROMPT in row ") for error in trial.errors)


SORTED = {
    "null-first": [[None] * 100 + ["good"] * 1900],
    "null-first-in-each-file": [[None] * 30 + ["good"] * 470] * 4,
    "longest-first": [["x" * 3000] * 100 + ["good"] * 1900],
    "all-files-null-but-the-largest": [[None] * 20, [None] * 20, ["good"] * 2000, [None] * 20, [None] * 20],
    "good-first": [["good"] * 1900 + [None] * 100],
}


@pytest.mark.parametrize("files", SORTED.values(), ids=SORTED)
def test_rows_are_drawn_over_the_whole_dataset_so_the_order_of_rows_does_not_matter(tmp_path, files):
    trial = over(tmp_path, *files, limits={"max_model_len": 2000}).trial
    assert trial.num_rows == 64
    assert 0 < len(trial.errors) < 16, "about as many as the dataset has"


def test_rows_are_drawn_from_those_that_the_job_takes(tmp_path):
    """Of 2,000 rows the job takes 40, which are good."""
    (tmp_path / "in").mkdir()
    table = pa.table({"prompt": [None if n % 50 else f"good {n}" for n in range(2000)], "n": range(2000)})
    pq.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=300)
    numbers = list(range(0, 2000, 50))
    ready = ready_job(write_job(tmp_path, input={"path": "in", "filters": [["n", "in", numbers]]}))
    assert (ready.trial.num_rows, ready.trial.errors) == (40, ())


def test_large_row_groups_are_tried_with_fewer_rows(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["good"] * 2000}), tmp_path / "in" / "a.parquet", row_group_size=100)
    assert ready_job(write_job(tmp_path)).trial.num_rows == 16, "each lies in another row group"
    monkeypatch.setattr(trial, "MAX_BYTES", 1)
    assert ready_job(write_job(tmp_path)).trial.num_rows == 8


def test_column_that_is_only_passed_through_is_not_read(tmp_path):
    """It has a page that cannot be read, which would leave no trial."""
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    table = pa.table({"prompt": ["good"] * 100, "note": ["needle" * 9] * 100})
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[content.index(b"needle" * 9)] ^= 1
    path.write_bytes(content)
    assert ready_job(write_job(tmp_path)).trial.num_rows == 64


def test_no_rows_are_no_trial(tmp_path):
    assert over(tmp_path, []).trial.num_rows == 0


def test_row_that_ends_the_process_is_left_to_the_plan(tmp_path):
    bombs = {
        "chat_template": "{% if 'LOOP' in messages[0]['content'] %}" + LOOPS + "{% endif %}{{ messages[0]['content'] }}"
    }
    assert over(tmp_path, ["LOOP"] * 1000, prompt=bombs).trial.num_rows == 0


def test_damaged_page_is_left_to_the_plan(tmp_path):
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(
        pa.table({"prompt": ["a" * 50] * 2000}),
        path,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    assert ready_job(write_job(tmp_path)).trial.num_rows == 0


def own_pid():
    yield os.getpid()


def test_child_that_checked_a_job_prepares_its_rows(tmp_path):
    with checking_child() as child:
        ready = ready_job(write_job(write_input(tmp_path)), child=child)
        (pid,) = child.stream(own_pid)
        plan_job(ready, lambda line: None, child)
        assert list(child.stream(own_pid)) == [pid]


def test_child_of_its_own_ends_with_the_check(tmp_path, monkeypatch):
    children = []
    monkeypatch.setattr(job, "checking_child", lambda: children.append(checking_child()) or children[0])
    job.ready_job(write_job(write_input(tmp_path)))
    assert [child._child for child in children] == [None]
