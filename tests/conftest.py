"""What several test files share: one Ray for each test process, runs without Ray, a tiny model on disk, a bucket."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Tests run beside others: how long an example takes says nothing.
settings.register_profile("segue", deadline=None)
settings.register_profile("fuzz", deadline=None, max_examples=5000)
settings.load_profile(os.environ.get("SEGUE_HYPOTHESIS", "segue"))

# A test that uses Ray without `local_ray` fails, where Ray would start one by itself.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

ROOT = Path(__file__).parents[1]
_shared_ray = ExitStack()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest come first: tests of the shared Ray, then files with slow tests."""
    slow = {item.path for item in items if any(item.get_closest_marker(name) for name in ("slow", "chaos"))}
    items.sort(key=lambda item: (not _needs_ray(item), item.path not in slow))


@pytest.hookimpl(optionalhook=True)  # without xdist there is no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """A file's tests run in one process, and so do those of all files that share something dear.

    `--dist=loadgroup` would say so by a mark, but pytest-xdist 3.8 does not see groups under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group_of(nodeid.partition("::")[0])

    return ByGroup(config, log)


@cache
def _group_of(file: str) -> str:
    """Files with tests of the shared Ray are one group, those of one training another, the others a group each."""
    if "local_ray" in (ROOT / file).read_text(encoding="utf-8"):
        return "ray"
    return "training" if file.startswith("tests/pipeline/train/") else file


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test without `local_ray` finds no Ray in its process: it may start one of its own, or refuse to."""
    if not _needs_ray(item):
        _end_shared_ray()


def pytest_sessionfinish() -> None:
    _end_shared_ray()


def _end_shared_ray() -> None:
    with _stdout_kept():
        _shared_ray.close()


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """A Ray session replaces stdout, and outlives what pytest captures it with."""
    stdout = sys.stdout
    try:
        yield
    finally:
        sys.stdout = stdout


def _needs_ray(item: pytest.Item) -> bool:
    return "local_ray" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="module")
def local_ray():
    """The Ray that all tests of this process share.

    It keeps idle workers for a minute, not a second: starting the next ones takes longer than most tests.
    """
    import ray  # most files need neither Ray nor torch

    from segue.pipeline.processes.ray_session import ray_session

    if not ray.is_initialized():
        with pytest.MonkeyPatch.context() as patch, _stdout_kept():  # not for the Rays of commands that tests start
            patch.setenv("RAY_idle_worker_killing_time_threshold_ms", "60000")
            _shared_ray.enter_context(ray_session(num_cpus=2))


@pytest.fixture
def here():
    """Jobs that the test checks, plans and runs, by a call or by a command, start no Ray and no child process."""
    from in_process import without_children, without_ray

    with without_ray(), without_children():
        yield


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> str:
    """A folder with a random Llama of a few thousand weights, whose tokens are bytes."""
    from tiny_models import tiny_model, tiny_tokenizer

    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def moto():
    """(host, port) of an S3 server in memory."""
    from store_servers import moto_server

    with moto_server() as address:
        yield address


@pytest.fixture
def proxy(moto, monkeypatch):
    """The way to an empty bucket `data`, for this process and its children."""
    from fault_proxy import fault_proxy
    from s3fs import S3FileSystem
    from store_servers import S3_ENVIRONMENT, empty_bucket

    empty_bucket(*moto)
    with fault_proxy(*moto) as found:
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
