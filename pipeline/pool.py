"""Units through a pool of workers: Ray Data schedules them, restarts what died, and hands back receipts.

Knows Ray; what a unit is and how it is committed is the worker's business.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy, Dataset
from ray.util.annotations import RayDeprecationWarning

from pipeline import cluster
from pipeline.config import WorkersConfig
from pipeline.unit_worker import Receipt, UnitWorker, WorkerSpec
from pipeline.units import UnitSpec

MAX_TASK_RETRIES = 3  # a unit is tried four times, then the pass is lost
MAX_RESTARTS = 10  # of one worker; Ray's default is endless, and so would be a model that dies while it loads


def threads_of(workers: WorkersConfig) -> int:
    """CPU threads of each worker: as asked for, else an equal share of the cluster; never more than a machine has."""
    share = cluster.num_cluster_cpus() // workers.max_size
    return min(workers.threads or max(1, share), cluster.max_node_cpus())


def run_units(units: Sequence[UnitSpec], workers: WorkersConfig, spec: WorkerSpec, progress: Any) -> Iterator[Receipt]:
    """Receipts as units finish, in plan order as far as Ray keeps it. Raises RayError."""
    rows = ray.data.from_items([{"unit": unit.to_json()} for unit in units], override_num_blocks=len(units))
    receipts = _through_pool(rows, len(units), workers, spec, progress)
    for batch in receipts.iter_batches(batch_size=1, prefetch_batches=0):
        yield Receipt(**json.loads(str(batch["receipt"][0])))


def _through_pool(rows: Dataset, num_units: int, workers: WorkersConfig, spec: WorkerSpec, progress: Any) -> Dataset:
    pool = ActorPoolStrategy(
        min_size=min(workers.min_size, num_units),
        max_size=min(workers.max_size, num_units),
        max_tasks_in_flight_per_actor=workers.units_in_flight,
        max_concurrent_calls_per_actor=workers.units_in_flight,
    )
    with warnings.catch_warnings():
        # Ray 2.60 has no other way to bound retries; the arguments go in 2.64.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
        return rows.map_batches(
            UnitWorker,
            batch_size=1,
            compute=pool,
            fn_constructor_args=(spec, progress),
            num_cpus=spec.threads,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_TASK_RETRIES,
        )
