"""Starts a local Ray, or joins the cluster in RAY_ADDRESS; never one that a file on this machine happens to name.

A Ray started here requires a token, which is kept in a private file while Ray runs. Without a token, anyone who reaches
a port of Ray can run code. Knows Ray; nothing of jobs.
"""

import atexit
import functools
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress

import psutil
import ray
import ray.exceptions
from ray.data import DataContext, Dataset

from segue.pipeline.problems import ClusterUnavailable, WorkersFailed, first_and_last_line
from segue.pipeline.processes.address import check_reachable

REQUIRE_AUTH = "SEGUE_REQUIRE_AUTH"  # environment variable
LOCAL_STARTS = 3
QUIET_LOGGERS = ("ray", "ray.data", "ray.serve")

_RAY_ADVICE = "\nFailed to apply UDF transform"  # Ray Data appends this to the message of an error in a task


@contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[None]:
    """Ray within the block: the cluster in RAY_ADDRESS if set, else a local Ray with token auth and no dashboard.

    A Ray that is already initialised in this process is used and left running. Ray's output goes to stderr: it reports
    dead workers on stdout, which is for results. Raises ClusterUnavailable.
    """
    with redirect_stdout(sys.stderr):
        if ray.is_initialized():
            yield
            return
        try:
            _start(num_cpus)
            quieten()
            yield
        finally:
            ray.shutdown()


def _start(num_cpus: int | None) -> None:
    """Start or join Ray from an empty folder: Ray puts the driver's working directory on its workers' path, where a
    module of the user could shadow one of ours or of our libraries."""
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what runs here is private
    if address and address != "local":
        _check_authentication(address)
        for problem in check_reachable():
            raise ClusterUnavailable(str(problem))
    here, scratch = os.getcwd(), _scratch_folder()
    try:
        os.chdir(scratch)
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            return
        os.environ["RAY_AUTH_TOKEN_PATH"] = _private_token(scratch)
        _start_here(num_cpus)
    except Exception as error:  # Ray raises a bare Exception for a node that starts too slowly
        raise ClusterUnavailable(f"Ray at {address or 'a local address'} cannot be used: {error}") from error
    except SystemExit as ended:
        # While Ray starts, its own handler of SIGTERM is in place. It exits with the signal's bare number.
        raise SystemExit(ended.code if ended.code == 128 + signal.SIGINT else 128 + signal.SIGTERM) from None
    finally:
        with suppress(FileNotFoundError):  # Ray (2.60) may have unpacked a submitted job's folder again, elsewhere
            os.chdir(here)


def _start_here(num_cpus: int | None) -> None:
    """Try several times: on a busy machine a node may need more than the 30 seconds that Ray (2.60) gives it."""
    for left in reversed(range(LOCAL_STARTS)):
        before = {child.pid for child in psutil.Process().children()}
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            _end([child for child in psutil.Process().children() if child.pid not in before])


def _end(processes: Sequence[psutil.Process]) -> None:
    """End processes and their children. Ray leaves a node running that came too late."""
    for process in processes:
        with suppress(psutil.Error):
            for each in [*process.children(recursive=True), process]:
                each.kill()


def _check_authentication(address: str) -> None:
    """Warn if we join without a token: anyone who reaches a port of a cluster without tokens can run code as we do.

    Raises ClusterUnavailable if a token is required.
    """
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return
    if os.environ.get(REQUIRE_AUTH) == "1":
        raise ClusterUnavailable(
            f"Ray at {address} is joined without a token, and {REQUIRE_AUTH}=1: set RAY_AUTH_MODE=token"
        )
    sys.stderr.write(
        f"warning: joining Ray at {address} without token authentication (RAY_AUTH_MODE=token): "
        "whoever reaches one of its ports can run code on it\n"
    )


@functools.cache
def _scratch_folder() -> str:
    """A private empty folder that exists until the process ends; Ray keeps the token that it read first as long."""
    folder = tempfile.mkdtemp(prefix="segue-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _private_token(folder: str) -> str:
    """The path of a token file of mode 0600. A local Ray (2.60) turns token auth on if it finds one; the file that it
    would make itself is readable by everybody."""
    path = os.path.join(folder, "ray-token")
    with suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return path


def quieten() -> None:
    """Turn off Ray's progress bars and logs in this process: they would hide our own progress, which is in tokens.

    Ray's errors still arrive as exceptions, and its log files stay as they are.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    for name in QUIET_LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.CRITICAL)


def wait_for_ever(dataset: Dataset) -> None:
    """Ray (2.60) ends an execution in which no block moves for half an hour. A unit may take longer, and a plan may
    wait longer for its CPUs. The watchdog finds workers that hang."""
    dataset.context.execution_no_progress_timeout_s = -1


def num_cluster_cpus() -> int:
    """CPUs of the whole cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def num_cluster_gpus() -> float:
    """GPUs of the whole cluster."""
    return float(ray.cluster_resources().get("GPU", 0))


def max_node_gpus() -> float:
    """GPUs of the node that has the most."""
    return max([0.0, *(float(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"])])


def max_node_cpus() -> int:
    """CPUs of the largest node, which a single worker can get. 0 while the only node is a head that takes no work."""
    return max([0, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])])


def cause_of(error: ray.exceptions.RayError, *expected: type[Exception]) -> Exception:
    """Why a task failed: an exception of an `expected` type as that type, any other as WorkersFailed."""
    inner: BaseException = error
    while isinstance(inner, ray.exceptions.RayTaskError) and isinstance(inner.cause, BaseException):
        inner = inner.cause
    message = str(inner).split(_RAY_ADVICE)[0]
    for kind in expected:
        if isinstance(inner, kind):
            return kind(message)
    return WorkersFailed(first_and_last_line(f"{type(inner).__name__}: {message}"))
