"""Rows with an error answered again, by the same job with what it lacked."""

import json
import os
from pathlib import Path

import pytest
from commands import last_line, segue
from echo_jobs import awkward_table, rows_of, write_input, write_job
from in_process import run_here, silent
from ready_jobs import ready_job

from segue.pipeline.ledger.failed_rows import failed_rows, retry_job
from segue.pipeline.problems import JobRefused
from segue.pipeline.run.run import plan_job, run_job

pytestmark = pytest.mark.usefixtures("here")
SHORT = {
    "limits": {"max_model_len": 61, "max_error_rate": 1.0}
}  # tokens are bytes; numbers of two digits have one more


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With an output in which every prompt with a number of two digits is too long."""
    folder = write_input(tmp_path_factory.mktemp("retry"))
    num_tokens = {len(prompt) + len("?user\n?\n?assistant\n") for prompt in awkward_table(0, 60)["prompt"].to_pylist()}
    summary = run_here(write_job(folder, limits={"max_model_len": max(num_tokens)}))
    assert summary.errors == {"PROMPT_TOO_LONG": 50}
    return folder


def test_retry_answers_the_rows_that_had_an_error_and_no_other(folder):
    arguments = ("--output", folder / "again", "--set", "limits.max_model_len=100", "--quiet")
    code, out, err = segue("retry", folder / "out", *arguments)
    summary = last_line(out)
    assert (code, summary["rows"], summary["errors"]) == (0, 50, {}), err
    first, second = rows_of(folder / "out"), rows_of(folder / "again")
    assert {key for key, row in first.items() if row["error"]} == set(second)
    for key, row in second.items():
        assert row["generated_text"] == f"{row['prompt']}\nassistant\n"[-6:]
        assert all(repr(row[name]) == repr(first[key][name]) for name in awkward_table(0, 1).column_names)


def test_retry_of_part_of_the_rows_by_a_job_file_keeps_to_its_limit(folder, tmp_path):
    limits = {"max_model_len": 100}
    job = write_job(folder, "part.yaml", limits=limits, input={"path": "in", "limit": 12, "retry_of": "out"})
    manifest = plan_job(ready_job(job, f"output.path={tmp_path / 'part'}"), silent)
    assert manifest.num_rows == ready_job(job).checked.num_rows == 2  # numbers 10 and 11


def test_retry_without_errors_is_a_job_without_rows(folder, tmp_path):
    arguments = ("--set", "limits.max_model_len=100", "--quiet")
    assert segue("retry", folder / "out", "--output", tmp_path / "again", *arguments)[0] == 0
    code, out, _ = segue("retry", tmp_path / "again", "--output", tmp_path / "third", *arguments)
    summary = last_line(out)
    assert (code, summary["status"], summary["rows"]) == (0, "done", 0)


def test_retry_of_what_is_not_finished_or_not_ours_is_refused(folder, tmp_path):
    (tmp_path / "other").mkdir()
    code, _, err = segue("retry", tmp_path / "other", "--output", tmp_path / "again")
    assert (code, "is not an output folder of Segue" in err) == (2, True)
    job = write_job(folder, "unfinished.yaml")
    plan_job(ready_job(job, f"output.path={tmp_path / 'planned'}"), silent)
    code, _, err = segue("retry", tmp_path / "planned", "--output", tmp_path / "again")
    assert (code, "is not complete" in err) == (2, True)
    assert not (tmp_path / "again").exists()


def test_retry_over_files_that_changed_is_refused(folder, tmp_path):
    path = folder / "in" / "b.parquet"
    before = path.stat()
    os.utime(path, ns=(1, 1))
    try:
        code, _, err = segue("retry", folder / "out", "--output", tmp_path / "again")
    finally:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert code == 2
    assert "input.path" in err
    assert "wanted the files that" in err


def test_the_job_in_a_manifest_is_the_job_file_as_it_was_understood(folder, tmp_path):
    (folder / "system.txt").write_text("Be brief.")
    messages = [{"role": "system", "content_file": "system.txt"}, {"role": "user", "content": "{prompt}"}]
    job = write_job(
        folder, "chat.yaml", prompt={"messages": messages}, sampling_params={"max_tokens": 3, "stop": ["x"]}
    )
    ready = ready_job(job, f"output.path={tmp_path / 'out'}")
    run_job(ready, silent, quiet=True)
    (folder / "system.txt").unlink()
    path = tmp_path / "again.yaml"
    path.write_text(json.dumps(retry_job(str(tmp_path / "out"), str(tmp_path / "again"))))
    again = ready_job(path)
    assert (dict(failed_rows(str(tmp_path / "out")).rows), again.checked.num_rows) == ({}, 0)
    assert {name for name in again.fields if again.fields[name] != ready.fields.get(name)} == {"input.retry_of"}


def test_retry_of_a_folder_that_is_no_output_is_refused_with_the_key(folder):
    job = write_job(folder, "bad.yaml", input={"path": "in", "retry_of": "in"})
    with pytest.raises(JobRefused, match=r"input\.retry_of.*wanted a complete output of segue run"):
        ready_job(job)
