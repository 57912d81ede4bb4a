"""Every step of the commit protocol as a place to die: on local disk and on S3, one death and two, in this process.

    make script RUN=tests/faults/crash_points.py      every step once, 60 pairs, both stores; prints how many
    make script RUN="tests/faults/crash_points.py --pairs 500 --seed 7"

The job's own code runs without Ray, with one worker after the other in this process
(`tests/support/jobs/in_process.py`). A dead process does nothing more: after a crash every later step of it crashes,
too, those of `finally` blocks included.
"""

import argparse
import errno
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

from echo_jobs import write_input, write_job
from fsspec.implementations.local import LocalFileSystem
from in_process import silent, without_children, without_ray
from oracle import check_exact, check_visible_are_whole, echo_answer
from ready_jobs import ready_job
from store_servers import S3_ENVIRONMENT, empty_bucket, moto_server

from segue.pipeline.ready.job import ReadyJob
from segue.pipeline.run import run
from segue.pipeline.storage import bucket as object_store
from segue.pipeline.storage import folder as local_store

HALF_WRITTEN, NOTE = "half of a temporary file is written", "before a note is written"
NUM_ROWS, ROWS_PER_FILE, MAX_TOKENS = 24, 10, 6
PLAN = {"window_rows": 20}  # two windows


class Crash(BaseException):
    """The process is dead."""


class Steps:
    """Counts steps by name, and dies at the one with number `fatal`, from 1."""

    def __init__(self, fatal: int | None = None) -> None:
        self.names: list[str] = []
        self.fatal = fatal
        self.is_dead = False

    def __call__(self, name: str) -> None:
        if self.is_dead:
            raise Crash("dead already")
        self.names.append(re.sub(r"-?([0-9a-f]{16}){1,2}\b", "", name))
        if len(self.names) == self.fatal:
            self.is_dead = True
            raise Crash(name)


class FullDisk(Steps):
    """From step number `fatal` on, whatever would write fails; nobody dies."""

    def __call__(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) >= (self.fatal or 0) and name in (HALF_WRITTEN, NOTE):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Place(Protocol):
    """Where a job reads and writes."""

    fs: Any
    inputs: str
    output: str
    job: ReadyJob

    def crashing(self, steps: Steps) -> Any: ...

    def clear(self) -> None: ...


class LocalPlace:
    """A folder."""

    def __init__(self, folder: Path) -> None:
        write_input(folder, NUM_ROWS)
        self.fs = LocalFileSystem()
        self.inputs, self.output = str(folder / "in"), str(folder / "out")
        output = {"path": "out", "max_rows_per_file": ROWS_PER_FILE}
        with without_children():
            self.job = ready_job(write_job(folder, plan=PLAN, output=output))

    def clear(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)

    @contextmanager
    def crashing(self, steps: Steps) -> Iterator[None]:
        clean, overwrite = local_store.LocalStore.remove_leftovers, local_store.LocalStore.overwrite

        def remove_leftovers(store: local_store.LocalStore) -> None:
            steps("before leftovers are removed")
            clean(store)

        def note(store: local_store.LocalStore, name: str, content: bytes) -> None:
            with local_store._storage_errors(store.root / name):
                steps(NOTE)
            overwrite(store, name, content)

        with (
            patch.object(local_store, "os", _CrashingOs(steps)),
            patch.object(local_store.LocalStore, "remove_leftovers", remove_leftovers),
            patch.object(local_store.LocalStore, "overwrite", note),
        ):
            yield


class _CrashingOs:
    """The calls of `os` that `pipeline/storage/folder.py` makes."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        return self._around("open", path, lambda: os.open(path, flags, mode))

    def fdopen(self, descriptor: int, mode: str) -> Any:
        return _CrashingFile(os.fdopen(descriptor, mode), self._steps)

    def fsync(self, descriptor: int) -> None:
        self._around("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), lambda: os.fsync(descriptor))

    def link(self, source: Any, target: Any) -> None:
        self._around("link", target, lambda: os.link(source, target))

    def unlink(self, path: Any) -> None:
        self._around("unlink", path, lambda: os.unlink(path))

    def _around(self, what: str, path: Any, call: Callable[[], Any]) -> Any:
        name = Path(path).name
        name = "temporary file" if name.startswith(local_store.TEMPORARY_PREFIX) else name
        self._steps(f"before {what} of {name}")
        result = call()
        self._steps(f"after {what} of {name}")
        return result


class _CrashingFile:
    """Dies with half of its content written."""

    def __init__(self, file: Any, steps: Steps) -> None:
        self._file = file
        self._steps = steps

    def __enter__(self) -> "_CrashingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: bytes) -> None:
        self._file.write(content[: len(content) // 2])
        self._file.flush()
        self._steps(HALF_WRITTEN)
        self._file.write(content[len(content) // 2 :])

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()


class BucketPlace:
    """A bucket `data`, which the environment says how to reach."""

    def __init__(self, folder: Path) -> None:
        from s3fs import S3FileSystem

        self.fs = S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        self.inputs, self.output = "data/in", "data/out"
        self.fs.put(str(write_input(folder, NUM_ROWS) / "in"), self.inputs, recursive=True)
        output = {"path": "s3://data/out", "max_rows_per_file": ROWS_PER_FILE}
        with without_children():
            self.job = ready_job(write_job(folder, input={"path": "s3://data/in"}, plan=PLAN, output=output))

    def clear(self) -> None:
        if self.fs.exists(self.output):
            self.fs.rm(self.output, recursive=True)

    @contextmanager
    def crashing(self, steps: Steps) -> Iterator[None]:
        crashing = _CrashingS3(self.fs, steps)
        with patch.object(object_store.ObjectStore, "_fs", property(lambda store: crashing)):
            yield


class _CrashingS3:
    """The calls of s3fs that `pipeline/storage/bucket.py` makes. After a PUT: it is applied, its reply never seen."""

    def __init__(self, fs: Any, steps: Steps) -> None:
        self._fs = fs
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._fs, name)

        def call(path: str, *args: Any, **kwargs: Any) -> Any:
            short = path.rpartition("/")[2]
            self._steps(f"before {name} of {short}")
            result = method(path, *args, **kwargs)
            self._steps(f"after {name} of {short}")
            return result

        return call


def run_job(place: Place) -> str:
    """The job's status. Raises Crash inside `place.crashing`."""
    with without_ray(), without_children():
        return run.run_job(place.job, silent, quiet=True).status


def steps_of(place: Place) -> list[str]:
    """Names of all steps of a run that nothing disturbs."""
    steps = Steps()
    place.clear()
    with place.crashing(steps):
        assert run_job(place) == "done"
    return steps.names


def crash(place: Place, *fatal: int) -> list[str]:
    """Die at these steps, each in the run after the last death; then finish. What is there must be exact.

    Returns the names of the steps; a number beyond a run's last step kills nobody, and ends the list.
    """
    place.clear()
    names = []
    for number in fatal:
        steps = Steps(number)
        with place.crashing(steps):
            try:
                run_job(place)
                break
            except Crash:
                names.append(steps.names[-1])
        check_visible_are_whole(place.fs, place.output)
    run_job(place)
    check_exact(place.fs, place.inputs, place.output, answer=lambda row: echo_answer(row["prompt"], MAX_TOKENS))
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description="die at every step of the commit protocol")
    parser.add_argument("--pairs", type=int, default=60, help="of deaths, drawn at random, for each store")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, bucket():
        for kind in (LocalPlace, BucketPlace):
            place = kind(Path(tempfile.mkdtemp(dir=folder)))
            names = steps_of(place)
            for number in range(1, len(names) + 1):
                crash(place, number)
            for pair in pairs_of(len(names), args.pairs, args.seed):
                crash(place, *pair)
            print(f"{kind.__name__}: {len(names)} steps ({len({*names})} names) and {args.pairs} pairs, all exact")


def pairs_of(num_steps: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Drawn at random."""
    draw = random.Random(seed)
    return [(draw.randint(1, num_steps), draw.randint(1, num_steps)) for _ in range(count)]


@contextmanager
def bucket() -> Iterator[tuple[str, int]]:
    """Host and port of an S3 server in memory with the bucket, and the environment that leads to it."""
    with moto_server() as (host, port):
        empty_bucket(host, port)
        with patch.dict(os.environ, S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}):
            yield host, port


if __name__ == "__main__":
    sys.exit(main())
