"""S3 servers that are nothing like moto: one that checks signatures and checksums and survives kill -9, one that
overwrites. Needs the extra `stores`; `make chaos` installs it."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from echo_jobs import outcome, segue_process, write_input, write_job
from fault_proxy import Fault, FaultProxy, fault_proxy
from oracle import check_exact, check_visible_are_whole, echo_answer
from s3fs import S3FileSystem
from store_servers import ADMIN, READER, S3_ENVIRONMENT, StoreServer, rclone, seaweedfs

from segue.pipeline.storage.bucket import ObjectStore
from segue.pipeline.storage.store import OutputStorageError

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def through(server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server, and the environment that leads to it."""
    with fault_proxy(*server.address) as proxy:
        use(monkeypatch, proxy.url, ADMIN)
        yield proxy
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(through: FaultProxy, tmp_path: Path) -> Any:
    """The server's file system, over a bucket `data` with the awkward rows in `in`."""
    fs = S3FileSystem(use_listings_cache=False)
    if fs.exists("data"):
        fs.rm("data", recursive=True)
    fs.mkdir("data")
    fs.put(str(write_input(tmp_path / "local") / "in"), "data/in", recursive=True)
    return fs


def use(monkeypatch: pytest.MonkeyPatch, url: str, keys: tuple[str, str]) -> None:
    names = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1]}
    for name, value in (S3_ENVIRONMENT | names).items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()


def job_of(folder: Path, output: str = "s3://data/out", **sections: Any) -> Path:
    return write_job(
        folder, input={"path": "s3://data/in"}, output={"path": output, "max_rows_per_file": 4}, **sections
    )


def run(job: Path) -> tuple[int, dict[str, Any], str]:
    with segue_process(job.parent, "run", str(job), "--json", "--quiet") as process:
        code, out, err = outcome(process)
    assert "canary" not in (out + err).lower()
    return code, json.loads(out) if out else {}, err


def check(fs: Any) -> None:
    check_exact(fs, "data/in", "data/out", answer=lambda row: echo_answer(row["prompt"], 6))


def test_one_of_sixteen_writers_wins(bucket):
    contents = [bytes([number]) * 1000 for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda content: ObjectStore("s3://data/race").create("a", content), contents))
    assert won.count(True) == 1
    assert ObjectStore("s3://data/race").read("a") == contents[won.index(True)]
    assert ObjectStore("s3://data/race").is_exclusive()


def test_byte_that_flips_on_the_way_in_is_refused_by_the_store_and_sent_again(bucket, through):
    through.faults.append(Fault("flip_request", path="flip/a"))
    store = ObjectStore("s3://data/flip")
    assert store.create("a", b"content" * 100)
    assert through.faults[0].times == 0
    assert store.read("a") == b"content" * 100


def test_run_through_faults_is_exact(bucket, through, tmp_path):
    for path in ("manifest.json", "part-", "_SUCCESS"):
        through.faults.append(Fault("lost_reply", path=path))
    through.faults += [Fault("status", path="units/", times=2), Fault("reset", "GET", path="units/")]
    through.faults += [Fault("flip", "GET", path="units/"), Fault("cut", "GET", path="part-")]
    through.faults += [Fault("flip_request", path="part-", times=2)]
    code, _, err = run(job_of(tmp_path))
    assert code == 0, err
    assert [fault for fault in through.faults if fault.times] == []
    check(bucket)


def test_store_that_is_killed_and_comes_back_in_the_middle_costs_nothing(bucket, server, tmp_path):
    def outage() -> None:
        while not bucket.glob("data/out/part-*"):
            time.sleep(0.1)
        server.kill()
        time.sleep(3)
        server.start()

    thread = threading.Thread(target=outage)
    thread.start()
    code, _, err = run(job_of(tmp_path, model={"source": "echo:0.5"}, workers={"units_in_flight": 1}))
    thread.join()
    assert code == 0, err
    check(bucket)


@pytest.mark.parametrize(
    ("keys", "output", "told"),
    [
        ((ADMIN[0], "not-the-secret-canary"), "s3://data/out", "SignatureDoesNotMatch|Forbidden|Access"),
        (("AKIANOBODY0CANARY000", "x-canary"), "s3://data/out", "InvalidAccessKeyId|Forbidden|Access"),
        (READER, "s3://data/out", "AccessDenied|Access Denied|Forbidden"),
        (ADMIN, "s3://no-such-bucket/out", "no such bucket"),
    ],
    ids=["wrong secret", "unknown key", "read only", "no bucket"],
)
def test_output_that_cannot_be_written_is_refused_at_the_start(
    bucket, through, tmp_path, monkeypatch, keys, output, told
):
    use(monkeypatch, through.url, keys)
    code, _, err = run(job_of(tmp_path, output))
    assert code in (2, 5), err
    assert any(word in err for word in told.split("|")), err
    assert not bucket.exists("data/out/_job/manifest.json")


def test_store_that_overwrites_is_refused(tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    with rclone(tmp_path / "server") as server:
        use(monkeypatch, server.url, ADMIN)
        fs = S3FileSystem(use_listings_cache=False)
        fs.put(str(write_input(tmp_path / "local") / "in"), "data/in", recursive=True)
        code, _, err = run(job_of(tmp_path))
        assert (code, "a store that honours If-None-Match; this one overwrites" in err) == (2, True), err
        check_visible_are_whole(fs, "data/out")
    S3FileSystem.clear_instance_cache()


def test_store_that_is_not_there_is_told_in_time(tmp_path, monkeypatch):
    use(monkeypatch, "http://127.0.0.1:9", ADMIN)
    monkeypatch.setattr("segue.pipeline.storage.bucket.RETRY_SECONDS", (0.01,))
    with pytest.raises(OutputStorageError, match="s3://data/out/a"):
        ObjectStore("s3://data/out").create("a", b"")
