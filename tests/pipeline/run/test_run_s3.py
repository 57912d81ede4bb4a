"""Whole runs from S3 to S3, over HTTP, while requests fail."""

import json

import pytest
from commands import last_line, segue
from echo_jobs import LOCATIONS, NUM_ROWS, awkward_table, origins, rows_of, write_job
from fault_proxy import Fault

pytestmark = pytest.mark.usefixtures("here")


def pending_uploads(fs):
    return fs.call_s3("list_multipart_uploads", Bucket="data").get("Uploads", [])


def test_rows_go_from_s3_to_s3_exactly_once_through_faults(bucket, proxy, tmp_path):
    for path in ("manifest.json", "part-", "_SUCCESS"):
        proxy.faults.append(Fault("lost_reply", path=path))
    proxy.faults += [Fault("status", path="units/", times=2), Fault("reset", "GET", path="units/")]
    proxy.faults += [Fault("status", "GET", path="in/", status=500, code="InternalError"), Fault("cut", "GET", "part-")]
    job = write_job(tmp_path, **LOCATIONS)
    code, out, err = segue("run", job, "--quiet")
    assert code == 0, err
    assert [fault for fault in proxy.faults if fault.times] == []
    bucket.get("data/out", str(tmp_path / "out"), recursive=True)
    rows = rows_of(tmp_path / "out")
    assert set(rows) == origins()
    half = NUM_ROWS // 2
    wanted = {("a.parquet", n): row for n, row in enumerate(awkward_table(0, half).to_pylist())}
    assert all(rows[key]["price"] == row["price"] and rows[key]["time"] == row["time"] for key, row in wanted.items())
    success = json.loads((tmp_path / "out" / "_SUCCESS").read_bytes())
    assert sum(shard["rows"] for shard in success["shards"]) == NUM_ROWS
    assert pending_uploads(bucket) == []
    assert "canary" not in (out + err).lower()

    code, out, _ = segue("run", job, "--quiet")
    assert (code, last_line(out)["status"]) == (0, "already_complete")
    code, _, err = segue("run", job, "--quiet", "--set", "sampling_params.max_tokens=5")
    assert code == 2
    assert "sampling_params" in err
    code, out, err = segue("errors", "s3://data/out")
    assert (code, last_line(out)["errors"]) == (0, {}), err


def test_store_that_overwrites_is_refused_before_anything_is_planned(bucket, proxy, tmp_path):
    proxy.drops_conditions = True
    code, _, err = segue("run", write_job(tmp_path, **LOCATIONS), "--quiet")
    assert code == 2
    assert "output.path: got 's3://data/out/', wanted a store that honours If-None-Match" in err
    assert bucket.find("data/out") == ["data/out/_job/.probe"]


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        ("s3://no-such-bucket/out", "there is no such bucket"),
        ("s3://data/in/out", "where input.path 's3://data/in' would read the results"),
        ("gs://data/out", "an s3:// URL"),
    ],
)
def test_output_that_cannot_be_is_refused_in_one_line(bucket, tmp_path, output, wanted):
    job = write_job(tmp_path, input=LOCATIONS["input"], output={"path": output})
    code, _, err = segue("validate", job)
    assert code == 2
    assert wanted in err


def test_denied_output_is_refused_before_the_start(bucket, proxy, tmp_path):
    proxy.faults.append(Fault("status", "GET", path="prefix=out", times=10**6, status=403, code="AccessDenied"))
    code, _, err = segue("validate", write_job(tmp_path, **LOCATIONS))
    assert code == 2
    assert "AccessDenied" in err
    assert "canary" not in err.lower()
