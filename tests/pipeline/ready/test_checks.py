"""What a job is refused for before any work, beside its columns and its output."""

import pyarrow as pa
import pytest
from bad.cases import job, write
from ready_jobs import ready_job, refusal, refusals

from segue.pipeline.problems import JobRefused, Problem
from segue.pipeline.ready import job as checking


def test_check_missing_input_is_named(tmp_path):
    assert refusal(job(tmp_path)).startswith("input.path: got ")


def test_check_no_rows_is_a_valid_job(tmp_path):
    write(tmp_path / "in/a.parquet", pa.table({"prompt": pa.array([], pa.string())}))
    assert ready_job(job(tmp_path)).checked.inputs[0].num_rows == 0


@pytest.mark.parametrize(
    ("num_gpus", "has_gpu", "is_fine"),
    [("auto", False, False), ("auto", True, True), (0, True, False), (1, False, True), (0.5, False, True)],
)
def test_check_float16_needs_a_gpu(tmp_path, monkeypatch, num_gpus, has_gpu, is_fine):
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster may have the GPUs that this machine lacks
    monkeypatch.setattr(checking, "num_gpus_here", lambda: int(has_gpu))
    write(tmp_path / "in/a.parquet", {"prompt": ["x"]})
    path = job(tmp_path, model={"source": "echo", "dtype": "float16"}, workers={"num_gpus": num_gpus})
    if is_fine:
        assert ready_job(path).checked.inputs
    else:
        assert refusal(path).startswith("model.dtype: ")


def test_check_adds_the_problems_of_others(tmp_path):
    lines = refusals(job(tmp_path), others=[Problem("model.source", "'x'", "a model")])
    assert [line.split(": ")[0] for line in lines] == ["model.source", "input.path"]


def test_check_file_lists_mistakes_of_the_file_and_of_the_data_at_once(tmp_path):
    write(tmp_path / "in/a.parquet", {"prompt": ["x"], "error": ["e"]})
    write(tmp_path / "in/b.parquet", {"Prompt": ["x"], "error": ["e"]})
    (tmp_path / "in/c.parquet").touch()
    file = tmp_path / "job.yaml"
    text = "name: a/b\nmodel: {sorce: echo}\nmodel: {}\ninput: {path: in}\noutput: {path: in/out}\nmask: 1\n"
    file.write_text(text)

    def keys() -> list[str]:
        with pytest.raises(JobRefused) as refused:
            ready_job(file, "seed=x")
        return [str(problem).split(" got ")[0] for problem in refused.value.problems]

    common = [
        "job.yaml:3: model:",
        "job.yaml:1: name:",
        "job.yaml:2: model.source:",
        "job.yaml:2: model.sorce:",
        "job.yaml:6: mask:",
        "--set: seed:",
    ]
    assert keys() == [*common, "job.yaml:4: input.path:", "job.yaml:5: output.path:"]
    (tmp_path / "in/c.parquet").unlink()
    columns = ["job.yaml:5: output.columns:", "job.yaml: prompt:", "job.yaml:5: output.columns:"]
    assert keys() == [*common, *columns, "job.yaml:5: output.path:"]


def test_check_file_that_is_right_gives_the_job(tmp_path):
    write(tmp_path / "in/a.parquet", {"body": ["x"]})
    file = tmp_path / "job.yaml"
    file.write_text("name: a\nmodel: {source: echo}\ninput: {path: in, columns: {prompt: body}}\noutput: {path: out}\n")
    checked = ready_job(file, "input.limit=1").checked
    assert checked.config.input.limit == 1
    assert checked.columns.prompt == ("body",)
    assert checked.template.prompt_column == "body"
