"""Units whose worker died: which of their rows does it.

A row is convicted only if it died alone, in two different processes: whatever else was in flight with a bad row has
died with it, too. Knows Ray, and rows by their place in a unit; nothing of what is in them.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import ray
import ray.exceptions

from segue.pipeline.ledger.units import UnitSpec
from segue.pipeline.processes.reservation import Reservation
from segue.pipeline.ready.worker_spec import WorkerSpec
from segue.pipeline.run.watchdog import Watchdog
from segue.pipeline.run.worker import Receipt, UnitWorker
from segue.workers.errors import RowError, RowErrorCode

MAX_ATTEMPTS = 3  # of a unit that dies although none of its rows dies alone
NUM_CANARIES = 3

Outcome = Literal["survived", "drained"] | RowError  # an error is a death, and what a row that died alone gets


class Quarantine:
    """One worker, one call at a time; a new process after each death. To be closed.

    `may_go_on(unit, n)` is asked after each search, `n` being how many of the unit's rows were convicted so far.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        roster: Any,
        watchdog: Watchdog,
        reservation: Reservation,
        may_go_on: Callable[[UnitSpec, int], bool],
    ) -> None:
        self._spec = spec
        self._roster = roster
        self._watchdog = watchdog
        self._reservation = reservation
        self._may_go_on = may_go_on
        self._worker: Any = None
        self._num_failures = 0  # said by processes before their end, and seen here

    def settle(self, unit: UnitSpec) -> Receipt | None:
        """Of a unit that died alone: its receipt, its culprits being rows with an error; None if it still dies, or was
        given up."""
        convicted: dict[int, RowError] = {}
        for _ in range(MAX_ATTEMPTS):
            rest = [place for place in range(unit.num_rows) if place not in convicted]
            if not self._search(unit, rest, convicted):
                return None
            try:
                return ray.get(self._there().receipt.remote(unit, convicted))
            except ray.exceptions.RayError:
                self._cause_of_death()
        return None

    def does_any_survive(self, units: Sequence[UnitSpec]) -> bool:
        """Whether any of a few rows, as far from each other as they can be, is answered when it is alone."""
        rows = [(unit, place) for unit in _spread(units) for place in _spread(range(unit.num_rows))]
        return any(not isinstance(self._try(unit, [place]), RowError) for unit, place in _spread(rows))

    def close(self) -> None:
        """Give the worker's resources back."""
        if self._worker is not None:
            ray.kill(self._worker)
            self._worker = None

    def _search(self, unit: UnitSpec, places: Sequence[int], convicted: dict[int, RowError]) -> bool:
        """Convict those of some rows, which died together, that die alone. False if it was given up."""
        if len(places) == 1:
            outcome = self._try(unit, places)
            if isinstance(outcome, RowError):
                convicted[places[0]] = outcome
            return outcome != "drained" and self._may_go_on(unit, len(convicted))
        left, right = places[: len(places) // 2], places[len(places) // 2 :]
        has_left_survived = False
        for part in (left, right):
            # If the first half survives, the second is to blame; a single row has still to die alone.
            outcome = "blamed" if has_left_survived and len(part) > 1 else self._try(unit, part)
            if outcome == "drained" or (outcome != "survived" and not self._search(unit, part, convicted)):
                return False
            has_left_survived = outcome == "survived"
        return True

    def _try(self, unit: UnitSpec, places: Sequence[int]) -> Outcome:
        try:
            return "survived" if ray.get(self._there().try_rows.remote(unit, places)) else "drained"
        except ray.exceptions.RayTaskError:
            raise  # not a death: the unit cannot be read
        except ray.exceptions.RayError:
            return self._cause_of_death()

    def _there(self) -> Any:
        """The worker, a new one if the last has died."""
        if self._worker is None:
            options = {**self._reservation.options(), "max_restarts": 0, "max_task_retries": 0}
            self._worker = ray.remote(UnitWorker).options(**options).remote(self._spec, self._roster)
        return self._worker

    def _cause_of_death(self) -> RowError:
        """Of the worker, which is gone then."""
        actor_id = self._worker._actor_id.hex()
        self._worker = None
        said: list[str] = []
        with suppress(ray.exceptions.RayError):  # a roster that died, too, knows nothing
            health: Any = ray.get(self._roster.health.remote())
            said, self._num_failures = health.failures[self._num_failures :], len(health.failures)
        if any(process.actor_id == actor_id for process in self._watchdog.killed):
            limit = f"{self._watchdog.step_timeout_s:g} s (workers.step_timeout_s)"
            message = f"twice, with this row alone in the worker, no step was finished within {limit}"
            return RowError(RowErrorCode.ROW_TIMEOUT, message)
        cause = said[-1].partition(":")[0] if said else "it crashed, or was killed"
        message = f"twice, with this row alone in it, the worker's process ended: {cause}"
        return RowError(RowErrorCode.WORKER_CRASH, message)


def _spread(items: Sequence[Any]) -> list[Any]:
    """First, middle and last."""
    places = sorted({0, len(items) // 2, len(items) - 1})
    return [items[place] for place in places][:NUM_CANARIES] if items else []
