"""Finds the rows that end their worker, in units whose worker has died.

A row is convicted only if it was alone in two processes that died, since every other row in flight dies with a bad row.
Knows Ray, and rows by their place in a unit; nothing of what rows contain.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import ray
import ray.exceptions

from segue.pipeline.ledger.units import UnitSpec
from segue.pipeline.ledger.verdicts import Verdicts
from segue.pipeline.processes.reservation import Reservation
from segue.pipeline.ready.worker_spec import WorkerSpec
from segue.pipeline.run.receipt import Receipt
from segue.pipeline.run.watchdog import Watchdog
from segue.pipeline.run.worker import UnitWorker
from segue.workers.errors import RowError, RowErrorCode

MAX_ATTEMPTS = 3  # for a unit whose worker dies although no row alone ends it
NUM_CANARIES = 3

Outcome = Literal["survived", "drained"] | RowError  # an error: the worker died; a row that was alone gets this error


class Quarantine:
    """One worker that gets one call at a time, and a new process after each death. Close it at the end.

    `may_go_on(unit, n)` is asked after each search step; `n` rows of the unit are convicted so far.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        roster: Any,
        watchdog: Watchdog,
        reservation: Reservation,
        may_go_on: Callable[[UnitSpec, int], bool],
        verdicts: Verdicts,
    ) -> None:
        self._spec = spec
        self._roster = roster
        self._watchdog = watchdog
        self._reservation = reservation
        self._may_go_on = may_go_on
        self._verdicts = verdicts
        self._worker: Any = None
        self._num_failures = 0  # of those in the roster's health that were read here

    def settle(self, unit: UnitSpec) -> Receipt | None:
        """Commit a unit whose worker died while the unit was alone in it; convicted rows get an error. An earlier run
        may have convicted some or all of them.

        None if the worker still dies, or if the search was given up.
        """
        convicted = self._verdicts.load(unit)
        is_searched = bool(convicted)
        for _ in range(MAX_ATTEMPTS):
            rest = [place for place in range(unit.num_rows) if place not in convicted]
            if not is_searched and not self._search(unit, rest, convicted):
                return None
            is_searched = False
            try:
                receipt: Any = ray.get(self._living().receipt.remote(unit, convicted))
            except ray.exceptions.RayError:
                self._cause_of_death()
                continue
            if receipt.is_published:
                self._verdicts.forget(unit)
            return receipt
        return None

    def does_any_survive(self, units: Sequence[UnitSpec]) -> bool:
        """Whether at least one of a few rows, far from each other, is answered when it is alone in the worker."""
        rows = [(unit, place) for unit in _spread(units) for place in _spread(range(unit.num_rows))]
        return any(not isinstance(self._try(unit, [place]), RowError) for unit, place in _spread(rows))

    def close(self) -> None:
        """Give the worker's resources back."""
        if self._worker is not None:
            ray.kill(self._worker)
            self._worker = None

    def _search(self, unit: UnitSpec, places: Sequence[int], convicted: dict[int, RowError]) -> bool:
        """Find the bad rows among `places`, which were in a worker that died. False if the search was given up."""
        if len(places) == 1:
            outcome = self._try(unit, places)
            if isinstance(outcome, RowError):
                convicted[places[0]] = outcome
                self._verdicts.save(unit, convicted)
            return outcome != "drained" and self._may_go_on(unit, len(convicted))
        left, right = places[: len(places) // 2], places[len(places) // 2 :]
        has_left_survived = False
        for part in (left, right):
            # If the first half survives, the second is to blame. A single row is still tried alone.
            outcome = "blamed" if has_left_survived and len(part) > 1 else self._try(unit, part)
            if outcome == "drained" or (outcome != "survived" and not self._search(unit, part, convicted)):
                return False
            has_left_survived = outcome == "survived"
        return True

    def _try(self, unit: UnitSpec, places: Sequence[int]) -> Outcome:
        try:
            return "survived" if ray.get(self._living().try_rows.remote(unit, places)) else "drained"
        except ray.exceptions.RayTaskError:
            raise  # the worker lives: the unit cannot be read
        except ray.exceptions.RayError:
            return self._cause_of_death()

    def _living(self) -> Any:
        """The worker; a new one if the last one died."""
        if self._worker is None:
            options = {**self._reservation.options(), "max_restarts": 0, "max_task_retries": 0}
            self._worker = ray.remote(UnitWorker).options(**options).remote(self._spec, self._roster)
        return self._worker

    def _cause_of_death(self) -> RowError:
        """Why the worker died, as the error of a row that was alone in it. The next call gets a new worker."""
        actor_id = self._worker._actor_id.hex()
        self._worker = None
        said: list[str] = []
        with suppress(ray.exceptions.RayError):  # the roster may have died as well
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
    """The first, the middle and the last item."""
    places = sorted({0, len(items) // 2, len(items) - 1})
    return [items[place] for place in places][:NUM_CANARIES] if items else []
