"""Units through a pool of workers: Ray Data schedules them, starts dead workers again, and hands back receipts.

What is lost with a worker is not tried again here: another pass does that, which may know better. Knows Ray; what a
unit is and how it is committed is the worker's business.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy, Dataset
from ray.util.annotations import RayDeprecationWarning

from segue.pipeline.jobfile.schema import WorkersConfig
from segue.pipeline.ledger.units import UnitSpec
from segue.pipeline.processes import ray_session
from segue.pipeline.processes.reservation import Reservation
from segue.pipeline.ready.worker_spec import WorkerSpec
from segue.pipeline.run.worker import Receipt, UnitWorker


def threads_of(workers: WorkersConfig) -> int:
    """CPU threads of each worker: as asked for, else an equal share of the cluster; never more than a machine has, if
    one is there."""
    wanted = workers.threads or max(1, ray_session.num_cluster_cpus() // workers.max_size)
    return min(wanted, ray_session.max_node_cpus() or wanted)


def workers_a_node(workers: WorkersConfig, num_cpus: float) -> int:
    """How many workers may share the memory of a machine, at most, if Ray gives each so many CPUs. All of them, while
    no machine is there to tell."""
    node_cpus = ray_session.max_node_cpus()
    return max(1, min(workers.max_size, int(node_cpus / num_cpus))) if node_cpus else workers.max_size


def reserved_cpus(threads: int, *, is_planning: bool) -> float:
    """What a worker takes of its node's CPUs in Ray's books: its threads, or less while the next window is planned.

    Planning then finds a CPU beside a pool that has the cluster to itself. Ray knows no fractions above 1.
    """
    if not is_planning:
        return threads
    return threads - 1 if threads > 1 else 0.5


def run_units(
    units: Sequence[UnitSpec],
    workers: WorkersConfig,
    spec: WorkerSpec,
    roster: Any,
    reservation: Reservation,
    *,
    units_in_flight: int,
) -> Iterator[Receipt]:
    """Receipts as units finish, in plan order as far as Ray keeps it. A unit whose worker died has none.

    Raises RayError if the pool cannot be made.
    """
    rows = ray.data.from_items([{"unit": unit.to_json()} for unit in units], override_num_blocks=len(units))
    rows.context.max_errored_blocks = -1  # of this dataset: what is missing is plan minus listing, whatever Ray drops
    ray_session.wait_for_ever(rows)
    pool = _pool(workers, len(units), units_in_flight)
    receipts = _through_pool(rows, pool, spec, roster, reservation)
    for batch in receipts.iter_batches(batch_size=1, prefetch_batches=0):
        yield Receipt(**json.loads(str(batch["receipt"][0])))


def _pool(workers: WorkersConfig, num_units: int, units_in_flight: int) -> ActorPoolStrategy:
    return ActorPoolStrategy(
        min_size=min(workers.min_size, num_units),
        max_size=min(workers.max_size, num_units),
        max_tasks_in_flight_per_actor=units_in_flight,
        max_concurrent_calls_per_actor=units_in_flight,
    )


def _through_pool(
    rows: Dataset, pool: ActorPoolStrategy, spec: WorkerSpec, roster: Any, reservation: Reservation
) -> Dataset:
    with warnings.catch_warnings():
        # Ray 2.60 has no other way to bound retries; the arguments go in 2.64.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
        return rows.map_batches(
            UnitWorker,
            batch_size=1,
            compute=pool,
            fn_constructor_args=(spec, roster),
            **reservation.options(),
            max_restarts=-1,  # the watchdog bounds them
            max_task_retries=0,
        )
