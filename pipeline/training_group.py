"""A training in several processes through Ray Train, which starts them, joins them and starts them again if one dies.

Knows Ray; what a process does is `pipeline/training_process.py`'s business.
"""

import ray.exceptions
import ray.train
import torch
from ray.train.torch import TorchTrainer

from pipeline.cluster import WorkersFailed
from pipeline.training_process import NothingToTrain, TrainingSpec, train_process
from workers.model_source import ModelRefused
from workers.ranks import Ranks
from workers.train import TrainingDiverged

MAX_FAILURES = 3  # of the group; each time it goes on from its latest checkpoint


def train_group(spec: TrainingSpec, num_processes: int, threads: int, storage: str) -> None:
    """Train to the end. `storage` is a folder for what Ray Train records of itself.

    Raises NothingToTrain, TrainingDiverged, ModelRefused, WorkersFailed.
    """
    trainer = TorchTrainer(
        _train,
        train_loop_config={"spec": spec},
        scaling_config=ray.train.ScalingConfig(num_workers=num_processes, resources_per_worker={"CPU": threads}),
        run_config=ray.train.RunConfig(
            name="segue", storage_path=storage, failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES)
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise _cause(error) from None


def _train(config: dict[str, TrainingSpec]) -> None:
    """In each process. What cannot get better by trying again is raised by the driver, which looks at it first."""
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    train_process(config["spec"], ranks)


def _cause(error: BaseException) -> Exception:
    inner: BaseException | None = error
    expected = (NothingToTrain, TrainingDiverged, ModelRefused)
    while inner is not None:
        if isinstance(inner, expected):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    message = str(error).strip().splitlines() or ["no message"]
    return WorkersFailed(f"{type(error).__name__}: {message[-1][:600]}")
