"""What is refused before a training starts."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import segue
from finetune_jobs import ROWS, write, write_run

from segue.pipeline.problems import JobRefused
from segue.pipeline.train.finetune import prepare_finetune

# Ray's own code warns of itself; what it says of our calls stays an error.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")


def test_every_problem_of_a_job_is_told_at_once(tmp_path, monkeypatch):
    rows = {"path": "rows.parquet", "limit": 5, "sample": 0.5, "filters": [["question", "!=", None]]}
    path = write(tmp_path, "echo", evaluation={"path": "rows.parquet"}, input=rows, workers={"max_num_seqs": 3})
    with pytest.raises(JobRefused) as refused:
        prepare_finetune(path, ["model.adapter=nowhere"])
    text = str(refused.value)
    assert "model.source: got 'echo', wanted a model with weights" in text
    for name in ("limit", "sample", "filters"):
        assert f"input.{name}: got a value, wanted it left out" in text
    assert "model.adapter: got an adapter" in text
    assert "workers.max_num_seqs: got a value, wanted it left out" in text
    with pytest.raises(JobRefused, match=r"workers.num_gpus: got 1, wanted auto or 0: a training in several processes"):
        prepare_finetune(path, ["workers.num_gpus=1", "workers.max_size=2"])
    with pytest.raises(JobRefused, match=r"lora.rank: got an unknown key"):
        prepare_finetune(path, ["lora.rank=3"])
    with pytest.raises(JobRefused, match=r"training.learning_rate: .*greater than 0"):
        prepare_finetune(path, ["training.learning_rate=0"])
    with pytest.raises(JobRefused, match=r"evaluation.path: got .*nowhere.parquet"):
        prepare_finetune(path, ["evaluation.path=nowhere.parquet"])
    with pytest.raises(JobRefused, match=r"'replies'"):
        prepare_finetune(path, ["scoring.continuation_column=replies"])
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(JobRefused, match=r"output.path: got 's3://bucket/ft', wanted a local folder"):
        prepare_finetune(path, ["output.path=s3://bucket/ft"])


def test_validate_checks_a_training_without_starting_it(tmp_path, model_directory):
    path = write(tmp_path, model_directory)
    code, out, err = segue("validate", path)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1]) == {
        "valid": True,
        "rows": 30,
        "mask": "segment",
        "dtype": "float32",
        "planned": False,
        "sample": {"rows": 0, "errors": 0},
    }
    assert not (tmp_path / "ft").exists()
    code, _, err = segue("validate", path, "--set", "lora.target_modules=[nothing]")
    assert code == 2
    assert "no linear layer 'nothing'" in err


def test_training_is_no_task_of_run(tmp_path, model_directory):
    path = write_run(tmp_path, model_directory, task="finetune", model={"source": model_directory})
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    code, _, err = segue("run", path)
    assert code == 2
    assert "task: got 'finetune'" in err
