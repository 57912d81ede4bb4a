"""Models in a bucket: fetched once a machine, whole or not at all, and used like any other."""

from pathlib import Path

import pytest
from echo_jobs import rows_of, write_input, write_job
from fault_proxy import Fault
from in_process import run_here

from segue.pipeline.storage.models import local_source
from segue.workers.engine.engine import Engine
from segue.workers.errors import ModelRefused
from segue.workers.rows.params import SamplingParams


@pytest.fixture
def bucket(proxy, model_directory, tmp_path, monkeypatch):
    """With a tiny model in `data/model`, and an empty cache on this machine."""
    from s3fs import S3FileSystem

    monkeypatch.setenv("SEGUE_CACHE", str(tmp_path / "cache"))
    fs = S3FileSystem(use_listings_cache=False)
    for path in Path(model_directory).iterdir():
        fs.put_file(str(path), f"data/model/{path.name}")
    fs.pipe_file("data/model/modeling_x.py", b"raise SystemExit")
    return fs


def gets(proxy) -> int:
    return sum(method == "GET" and "/data/model/" in path for method, path in proxy.requests)


def test_model_is_downloaded_once_and_again_if_it_changes(bucket, proxy, model_directory):
    found = Path(local_source("s3://data/model"))
    wanted = {path.name: path.read_bytes() for path in Path(model_directory).iterdir()}
    assert {path.name: path.read_bytes() for path in found.iterdir()} == wanted
    before = gets(proxy)
    assert (local_source("s3://data/model"), gets(proxy)) == (str(found), before)
    bucket.pipe_file("data/model/config.json", wanted["config.json"] + b" ")
    again = Path(local_source("s3://data/model"))
    assert again != found
    assert (again / "config.json").read_bytes() == wanted["config.json"] + b" "


def test_download_that_breaks_leaves_nothing_that_looks_whole(bucket, proxy, tmp_path):
    proxy.faults.append(Fault("status", "GET", "model.safetensors", times=10**6, status=403, code="AccessDenied"))
    with pytest.raises(ModelRefused, match=r"model\.source: 's3://data/model' cannot be read"):
        local_source("s3://data/model")
    assert [path.suffix for path in (tmp_path / "cache" / "downloads").iterdir()] == [".lock"]
    proxy.faults.clear()
    assert (Path(local_source("s3://data/model")) / "model.safetensors").is_file()


@pytest.mark.parametrize(("source", "wanted"), [("s3://data/none", "there is nothing"), ("s3://data/odd", "no files")])
def test_place_without_a_model_is_refused_by_name(bucket, source, wanted):
    bucket.pipe_file("data/odd/pytorch_model.bin", b"pickle")
    with pytest.raises(ModelRefused, match=wanted):
        local_source(source)


def test_run_with_a_model_from_a_bucket_answers_as_with_the_same_model_from_a_folder(bucket, tmp_path, model_directory):
    folder = write_input(tmp_path, num_rows=8)
    job = write_job(folder, model={"source": "s3://data/model", "dtype": "float32"})
    assert run_here(job).num_errors == 0
    rows = list(rows_of(folder / "out").values())
    engine = Engine.from_pretrained(model_directory, mask="causal", dtype="float32")
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=6))
    assert [row["generated_text"] for row in rows] == [output.outputs[0].text for output in outputs]
