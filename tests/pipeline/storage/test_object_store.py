"""The store on S3, over real HTTP: moto behind a proxy that breaks what a test asks it to break."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from fault_proxy import Fault

from segue.pipeline.storage import bucket as object_store
from segue.pipeline.storage import remote
from segue.pipeline.storage.bucket import ObjectStore
from segue.pipeline.storage.store import OutputStorageError


@pytest.fixture
def store(proxy, monkeypatch):
    monkeypatch.setattr(object_store, "RETRY_SECONDS", (0.01,) * 3)
    return ObjectStore("s3://data/out/")


def test_what_is_created_is_there_and_named(store):
    assert store.names() == []
    assert store.create("_job/units/u.parquet", b"content")
    assert store.create("part ü %41+=.parquet", b"x")
    assert store.read("_job/units/u.parquet") == b"content"
    assert store.names() == ["_job/", "part ü %41+=.parquet"]
    assert store.data_names() == ["part ü %41+=.parquet"]
    assert store.exists("_job/units/u.parquet")
    assert not store.exists("_job/units")
    assert not store.exists("other")
    with store.open("_job/units/u.parquet") as file:
        file.seek(-4, 2)
        assert file.read() == b"tent"


def test_second_create_loses_and_changes_nothing(store):
    assert store.create("a", b"first")
    assert not store.create("a", b"second")
    assert store.read("a") == b"first"


def test_race_of_sixteen_has_one_winner(store):
    contents = [bytes([number]) * 1000 for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda content: ObjectStore("s3://data/out").create("a", content), contents))
    assert won.count(True) == 1
    assert store.read("a") == contents[won.index(True)]


def test_missing_object_is_told_apart_from_a_missing_bucket(store):
    for read in (store.read, lambda name: store.open(name).__enter__()):
        with pytest.raises(FileNotFoundError):
            read("nothing")
    elsewhere = ObjectStore("s3://no-such-bucket/out")
    for use in (lambda: elsewhere.create("a", b""), lambda: elsewhere.read("a")):
        with pytest.raises(OutputStorageError, match="s3://no-such-bucket/out/a: there is no such bucket"):
            use()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status"),
        Fault("status", status=500, code="InternalError"),
        Fault("status", status=409, code="ConditionalRequestConflict"),
        Fault("reset"),
        Fault("lost_reply"),
        Fault("status", status=400, code="BadDigest"),
    ],
    ids=["slow-down", "server-error", "conflict", "reset", "lost-reply", "damaged"],
)
def test_put_survives(store, proxy, fault):
    proxy.faults.append(fault)
    assert store.create("a", b"content"), "what we wrote is ours, also if the reply was lost"
    assert fault.times == 0
    assert store.read("a") == b"content"
    assert not store.create("a", b"other")


@pytest.mark.parametrize("kind", ["reset", "cut", "status"])
def test_get_survives(store, proxy, kind):
    content = bytes(range(256)) * 4000
    store.create("a", content)
    proxy.faults.append(Fault(kind, "GET", "/a"))
    assert store.read("a") == content
    proxy.faults.append(Fault(kind, "GET", "/a"))
    with store.open("a") as file:
        file.seek(-len(content) // 2, 2)
        assert file.read() == content[len(content) // 2 :]
    assert all(fault.times == 0 for fault in proxy.faults)


@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_server_that_never_answers_is_asked_again(store, proxy, monkeypatch, method):
    monkeypatch.setattr(remote, "READ_TIMEOUT_SECONDS", 1.5)
    assert store.create("first", b"content"), "a connection that was used before is another matter than a new one"
    proxy.faults.append(Fault("hang", method, "/a", times=2, seconds=60))
    assert store.create("a", b"content")
    assert store.read("a") == b"content"
    assert proxy.faults[0].times == 0


def test_lost_reply_after_another_was_first_is_a_lost_race(store, proxy):
    store.create("a", b"theirs")
    proxy.faults.append(Fault("lost_reply"))
    assert not store.create("a", b"ours")


def test_endless_throttling_ends_in_an_error_that_names_it(store, proxy):
    proxy.faults.append(Fault("status", times=10**6))
    with pytest.raises(OutputStorageError, match="s3://data/out/a: SlowDown"):
        store.create("a", b"content")


def test_denied_access_is_no_matter_of_patience_and_tells_no_secret(store, proxy):
    proxy.faults.append(Fault("status", times=10**6, status=403, code="AccessDenied"))
    with pytest.raises(OutputStorageError, match="AccessDenied") as raised:
        store.create("a", b"content")
    assert sum(method == "PUT" for method, _ in proxy.requests) == 1
    assert "canary" not in str(raised.value).lower()


def test_expired_credentials_are_read_again_once(store, proxy):
    proxy.faults.append(Fault("status", times=1, status=400, code="ExpiredToken"))
    assert store.create("a", b"content")
    proxy.faults.append(Fault("status", times=10**6, status=400, code="ExpiredToken"))
    with pytest.raises(OutputStorageError, match="ExpiredToken"):
        store.create("b", b"content")


def test_listing_goes_past_a_thousand_names(store):
    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    for number in range(1100):  # by hand: over HTTP it would take ten seconds
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object("data", f"out/part-{number:06d}", b"")
    assert store.names() == [f"part-{number:06d}" for number in range(1100)]
