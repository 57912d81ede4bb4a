"""What a worker takes of its node in Ray's books: CPUs, GPUs, a kind of GPU. Knows Ray's names; no worker."""

from dataclasses import dataclass, replace
from typing import Any

from segue.pipeline.jobfile.schema import WorkersConfig
from segue.pipeline.problems import WorkersFailed
from segue.pipeline.processes import ray_session


@dataclass(frozen=True, slots=True)
class Reservation:
    """Of each worker of a pool."""

    num_cpus: float
    num_gpus: float = 0.0
    accelerator_type: str | None = None  # as Ray calls it: H100, A100, L4

    def with_cpus(self, num_cpus: float) -> "Reservation":
        return replace(self, num_cpus=num_cpus)

    def options(self) -> dict[str, Any]:
        """For `ray.remote` and `map_batches`."""
        options: dict[str, Any] = {"num_cpus": self.num_cpus}
        if self.num_gpus:
            options["num_gpus"] = self.num_gpus
        if self.accelerator_type is not None:
            options["accelerator_type"] = self.accelerator_type
        return options


def gpus_of(workers: WorkersConfig) -> float:
    """GPUs of each worker: as asked for; `auto` is one if the cluster has any at the moment."""
    if workers.num_gpus != "auto":
        return workers.num_gpus
    return 1.0 if ray_session.num_cluster_gpus() else 0.0


def check_gpus(num_gpus: float, max_node_gpus: float, *, is_local: bool) -> str | None:
    """What to say if no node has as many GPUs as a worker wants.

    Raises WorkersFailed where none can come: Ray would wait for ever.
    """
    if num_gpus <= max_node_gpus:
        return None
    message = f"workers.num_gpus is {num_gpus:g}, and no node has more than {max_node_gpus:g} at the moment"
    if is_local:
        raise WorkersFailed(message)
    return f"{message}: waiting for the cluster to grow"
