"""What several test files share: a local Ray, and a tiny model on disk."""

import os
from contextlib import ExitStack

import pytest
from hypothesis import settings

# Tests run beside others: how long an example takes says nothing.
settings.register_profile("segue", deadline=None)
settings.register_profile("fuzz", deadline=None, max_examples=5000)
settings.load_profile(os.environ.get("SEGUE_HYPOTHESIS", "segue"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: two files run at a time, and the last one alone."""
    slow = {item.path for item in items if any(item.get_closest_marker(name) for name in ("slow", "chaos"))}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module")
def local_ray():
    """One Ray for all tests of a file that run in this process.

    It keeps idle workers for a minute, not a second: starting the next ones takes longer than most tests.
    """
    from segue.pipeline.processes.ray_session import ray_session  # most files need neither Ray nor torch

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # not for the Rays of commands that tests start
            patch.setenv("RAY_idle_worker_killing_time_threshold_ms", "60000")
            stack.enter_context(ray_session(num_cpus=2))
        yield


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> str:
    """A folder with a random Llama of a few thousand weights, whose tokens are bytes."""
    from tiny_models import tiny_model, tiny_tokenizer

    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE0CANARY00",
    "AWS_SECRET_ACCESS_KEY": "a-secret-canary",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session")
def moto():
    """(host, port) of an S3 server in memory."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def proxy(moto, monkeypatch):
    """The way to an empty bucket `data`, for this process and its children."""
    import urllib.request

    from fault_proxy import fault_proxy
    from s3fs import S3FileSystem

    host, port = moto
    for method, path in (("POST", "moto-api/reset"), ("PUT", "data")):
        request = urllib.request.Request(f"http://{host}:{port}/{path}", method=method)
        urllib.request.urlopen(request, timeout=30).close()
    with fault_proxy(host, port) as found:
        for name, value in (S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": found.url}).items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        yield found
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(proxy, tmp_path):
    """A file system over the bucket, which has the awkward rows."""
    from echo_jobs import write_input
    from s3fs import S3FileSystem

    fs = S3FileSystem(use_listings_cache=False)
    fs.put(str(write_input(tmp_path / "local") / "in"), "data/in", recursive=True)
    return fs
