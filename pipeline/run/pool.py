"""A pool of workers: Ray Data gives them units, restarts dead ones, and hands back receipts.

A unit that is lost with its worker is not tried again here; the next pass does that. Knows Ray; how a unit is computed
and committed is the worker's business.
"""

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
from segue.pipeline.run.receipt import Receipt
from segue.pipeline.run.worker import UnitWorker


def run_units(
    units: Sequence[UnitSpec],
    workers: WorkersConfig,
    spec: WorkerSpec,
    roster: Any,
    reservation: Reservation,
    *,
    units_in_flight: int,
) -> Iterator[Receipt]:
    """Receipts as units finish, in plan order as far as Ray keeps it. A unit whose worker died has no receipt.

    Raises RayError if the pool cannot be made.
    """
    rows = ray.data.from_items([{"unit": unit.to_json()} for unit in units], override_num_blocks=len(units))
    rows.context.max_errored_blocks = -1  # Ray may drop any block: what is missing is the plan minus the listing
    ray_session.wait_for_ever(rows)
    pool = _pool(workers, len(units), units_in_flight)
    receipts = _through_pool(rows, pool, spec, roster, reservation)
    for batch in receipts.iter_batches(batch_size=1, prefetch_batches=0):
        yield Receipt.from_json(str(batch["receipt"][0]))


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
        # Ray 2.60 has no other way to bound retries; it removes these arguments in 2.64.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
        return rows.map_batches(
            UnitWorker,
            batch_size=1,
            compute=pool,
            fn_constructor_args=(spec, roster),
            **reservation.options(),
            max_restarts=-1,  # the watchdog limits them
            max_task_retries=0,
        )
