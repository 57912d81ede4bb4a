"""A training in several processes of Ray Train, which starts them, connects them, and restarts them if one dies.

Knows Ray; `pipeline/train/process.py` knows what a process does.
"""

import threading
from pathlib import Path

import ray.train
import torch
from ray.train.torch import TorchTrainer

from segue.pipeline.ledger.units import UnitDamaged
from segue.pipeline.problems import MAX_MESSAGE_CHARS, WorkersFailed
from segue.pipeline.processes.interrupt import Interrupt
from segue.pipeline.processes.ray_session import num_cluster_cpus
from segue.pipeline.storage.store import OutputStorageError
from segue.pipeline.train.process import TrainingSpec, train_process
from segue.workers.training.params import TrainingDiverged
from segue.workers.training.ranks import Ranks

MAX_FAILURES = 3  # of the group; after each it goes on from the latest checkpoint
STOP = "_job/stop"  # while this file exists, processes finish their step, save and end
_EXPECTED = (TrainingDiverged, OutputStorageError, UnitDamaged)


def train_group(spec: TrainingSpec, num_processes: int, threads: int, storage: str, interrupt: Interrupt) -> None:
    """Train to the end, or until `interrupt` is set and the step at work is done. `storage` is a folder for Ray Train's
    own records.

    Raises TrainingDiverged, OutputStorageError, WorkersFailed.
    """
    _check_cpus(num_processes, threads)
    trainer = TorchTrainer(
        _train,
        train_loop_config={"spec": spec},
        scaling_config=ray.train.ScalingConfig(num_workers=num_processes, resources_per_worker={"CPU": threads}),
        run_config=ray.train.RunConfig(
            name="segue",
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=MAX_FAILURES),
        ),
    )
    failures: list[BaseException] = []
    # In a thread: in the main thread Ray Train handles SIGINT itself, and ends the process with exit code 0.
    thread = threading.Thread(target=_fit, args=(trainer, failures), name="segue-ray-train", daemon=True)
    stop = Path(spec.output) / STOP
    stop.unlink(missing_ok=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.5)
        if interrupt.is_set:
            stop.touch()
    stop.unlink(missing_ok=True)
    if failures:
        raise cause_of_group(failures[0]) from None


def _fit(trainer: TorchTrainer, failures: list[BaseException]) -> None:
    try:
        trainer.fit()
    except BaseException as error:  # the waiting thread raises it
        failures.append(error)


def _train(config: dict[str, TrainingSpec]) -> None:
    """Runs in each process."""
    spec = config["spec"]
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    train_process(spec, ranks, (Path(spec.output) / STOP).exists)


def _check_cpus(num_processes: int, threads: int) -> None:
    """Raises WorkersFailed if the cluster has too few CPUs: Ray would wait for them for ever."""
    wanted, there = num_processes * threads, num_cluster_cpus()
    if wanted > there:
        raise WorkersFailed(
            f"workers.max_size {num_processes} with {threads} threads each wants {wanted} CPUs, the cluster has {there}"
        )


def cause_of_group(error: BaseException) -> Exception:
    """Why a process failed: an expected error as it is, any other as WorkersFailed."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    for failure in failures.values():
        inner: BaseException | None = failure
        while inner is not None:
            if isinstance(inner, _EXPECTED):
                return inner
            inner = getattr(inner, "cause", None) or inner.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return WorkersFailed(f"{type(error).__name__}: {lines[-1][:MAX_MESSAGE_CHARS]}")
