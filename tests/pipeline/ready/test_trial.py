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
from segue.pipeline.ready import job
from segue.pipeline.ready.child import checking_child
from segue.pipeline.ready.job import ReadyJob
from segue.pipeline.ready.trial import ROWS_EACH
from segue.pipeline.run.run import plan_job


def over(folder: Path, *files: list[str | None], **sections: Any) -> ReadyJob:
    """Over files a, b, ... with these prompts."""
    (folder / "in").mkdir()
    for name, prompts in zip("abcdef", files, strict=False):
        pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string())}), folder / "in" / f"{name}.parquet")
    return ready_job(write_job(folder, **sections))


def test_large_job_whose_tried_rows_all_fail_is_refused(tmp_path):
    with pytest.raises(JobRefused) as refused:
        over(tmp_path, [None] * 600, [None] * 100 + ["good"] * 300)
    assert str(refused.value).startswith(
        "prompt: got an error in each of 32 rows that were tried, the first NULL_PROMPT"
    )
    assert "in row 0 of a.parquet" in str(refused.value)


@pytest.mark.parametrize(
    ("files", "sections", "num_errors"),
    [
        ([[None] * 999], {}, ROWS_EACH),
        ([[None] * 1000], {"limits": {"max_error_rate": 1}}, ROWS_EACH),
        ([[None] * 1000], {"input": {"path": "in", "limit": 3}}, 3),
        ([[None] * 1000, ["good"]], {}, ROWS_EACH),
        ([[None, "good"] * 500], {}, ROWS_EACH // 2),
        ([["good"] * 20 + [None] * 1000], {}, 0),
    ],
    ids=["small", "errors-wanted", "limited", "one-file-good", "half", "later"],
)
def test_other_jobs_are_told_what_failed(tmp_path, files, sections, num_errors):
    trial = over(tmp_path, *files, **sections).trial
    assert len(trial.errors) == num_errors
    assert all(error.startswith("NULL_PROMPT in row ") for error in trial.errors)


def test_files_are_taken_from_the_whole_dataset_and_one_without_rows_is_passed_over(tmp_path):
    trial = over(tmp_path, [], ["good"], [None], [None], [None], ["good"]).trial
    assert trial.num_rows == 4
    assert [error.partition(" of ")[2][:1] for error in trial.errors] == ["c", "e"]


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
