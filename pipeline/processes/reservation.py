"""What each worker takes of its node in Ray's books: CPUs, GPUs, a kind of GPU.

Knows Ray's names and the job file's `workers`; nothing of what a worker does.
"""

from dataclasses import dataclass, replace
from typing import Any

from segue.pipeline.jobfile.schema import WorkersConfig
from segue.pipeline.problems import WorkersFailed
from segue.pipeline.processes import ray_session


@dataclass(frozen=True, slots=True)
class Reservation:
    """The resources of each worker of a pool."""

    num_cpus: float
    num_gpus: float = 0.0
    accelerator_type: str | None = None  # as Ray calls it: H100, A100, L4

    def with_cpus(self, num_cpus: float) -> "Reservation":
        return replace(self, num_cpus=num_cpus)

    def options(self) -> dict[str, Any]:
        """Arguments of `ray.remote` and `map_batches`."""
        options: dict[str, Any] = {"num_cpus": self.num_cpus}
        if self.num_gpus:
            options["num_gpus"] = self.num_gpus
        if self.accelerator_type is not None:
            options["accelerator_type"] = self.accelerator_type
        return options


def threads_of(workers: WorkersConfig) -> int:
    """CPU threads of each worker: `workers.threads`, else an equal share of the cluster's CPUs.

    Never more than the largest node has, unless there is no node yet.
    """
    wanted = workers.threads or max(1, ray_session.num_cluster_cpus() // workers.max_size)
    return min(wanted, ray_session.max_node_cpus() or wanted)


def reserved_cpus(threads: int, *, is_planning: bool) -> float:
    """CPUs that Ray books for each worker: its threads, or less while the next window is planned.

    Planning then finds a CPU beside a pool that has the cluster to itself. Ray takes no fractions above 1.
    """
    if not is_planning:
        return threads
    return threads - 1 if threads > 1 else 0.5


def workers_a_node(workers: WorkersConfig, num_cpus: float) -> int:
    """How many workers of `num_cpus` each may share a node's memory at most; all of them if there is no node yet."""
    node_cpus = ray_session.max_node_cpus()
    return max(1, min(workers.max_size, int(node_cpus / num_cpus))) if node_cpus else workers.max_size


def gpus_of(workers: WorkersConfig) -> float:
    """GPUs of each worker: `workers.num_gpus`; `auto` is 1 if the cluster has a GPU now, else 0."""
    if workers.num_gpus != "auto":
        return workers.num_gpus
    return 1.0 if ray_session.num_cluster_gpus() else 0.0


def check_gpus(num_gpus: float, max_node_gpus: float, *, is_local: bool) -> str | None:
    """A warning if no node has as many GPUs as a worker wants.

    Raises WorkersFailed on a single machine, which cannot grow: Ray would wait for ever.
    """
    if num_gpus <= max_node_gpus:
        return None
    message = f"workers.num_gpus is {num_gpus:g}, and no node has more than {max_node_gpus:g} at the moment"
    if is_local:
        raise WorkersFailed(message)
    return f"{message}: waiting for the cluster to grow"
