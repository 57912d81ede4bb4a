"""Computes the missing units of a plan, pass after pass, until none is missing or no pass makes progress.

A worker that dies takes all its units in flight with it. A lost unit goes through a second pass, in which each unit is
alone in its worker. A unit whose worker dies a second time is searched row by row. Knows the plan, the store and Ray.
"""

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import ray.exceptions

from segue.pipeline.ledger.completeness import missing_units
from segue.pipeline.ledger.manifest import Manifest
from segue.pipeline.ledger.units import UnitDamaged, UnitSpec
from segue.pipeline.ledger.verdicts import Verdicts
from segue.pipeline.problems import WorkersFailed
from segue.pipeline.processes import ray_session
from segue.pipeline.processes.address import is_local
from segue.pipeline.processes.interrupt import Interrupt
from segue.pipeline.processes.metrics import RunMetrics, label_of
from segue.pipeline.processes.progress import ProgressDisplay, Say, Totals
from segue.pipeline.processes.reservation import (
    Reservation,
    check_gpus,
    gpus_of,
    reserved_cpus,
    threads_of,
    workers_a_node,
)
from segue.pipeline.ready.job import ReadyJob
from segue.pipeline.run.pool import run_units
from segue.pipeline.run.quarantine import Quarantine
from segue.pipeline.run.receipt import Receipt
from segue.pipeline.run.roster import Roster
from segue.pipeline.run.tally import Tally
from segue.pipeline.run.watchdog import Watchdog
from segue.pipeline.storage.store import OutputStorageError


class Passes:
    """The passes of one run. The plan may grow from call to call. Receipts are added to `tally`, which nobody else
    changes; the first signal of `interrupt` drains the workers."""

    def __init__(self, job: ReadyJob, tally: Tally, interrupt: Interrupt, say: Say, *, quiet: bool) -> None:
        self._job = job
        self._workers = job.config.workers
        self._threads = threads_of(self._workers)
        smallest = reserved_cpus(self._threads, is_planning=job.checked.num_windows > 1)
        num_gpus = gpus_of(self._workers)
        warning = check_gpus(num_gpus, ray_session.max_node_gpus(), is_local=is_local())
        if warning is not None:
            say(warning)
        self._reservation = Reservation(smallest, num_gpus, self._workers.accelerator_type)
        self._spec = job.worker_spec(self._threads, workers_a_node(self._workers, smallest), num_gpus)
        self._tally = tally
        self._metrics = RunMetrics(label_of(job.config.name, self._spec.fingerprint))
        self._interrupt = interrupt
        self._say = say
        self._quiet = quiet
        self._failure: Exception | None = None  # that another attempt would meet again
        self._given_up: set[UnitSpec] = set()
        self._verdicts = Verdicts(job.store, f"{self._spec.engine} {self._spec.threads} {self._workers.step_timeout_s}")
        self.published: set[int] = set()  # ordinals of units that, as receipts say, have a shard

    def run(self, manifest: Manifest) -> None:
        """Compute the missing units of `manifest`. Raises the error of a unit that failed, and WorkersFailed if the
        workers of every unit die."""
        self._manifest = manifest
        self._tally.planned_errors = manifest.num_errors
        tokens = int(manifest.stats["tokens_requested"])
        self._metrics.planned(rows=manifest.num_rows, units=len(manifest.units), tokens=tokens)
        self._metrics.done(self._tally.all_rows)
        num_cpus = reserved_cpus(self._threads, is_planning=not manifest.is_complete)
        self._reservation = self._reservation.with_cpus(num_cpus)
        missing = self._missing()
        while missing and self.may_go_on:
            left = self._round(missing)
            if self._failure is not None:
                raise self._failure
            if len(left) == len(missing):
                self._given_up |= set(left)
                return
            missing = left

    @property
    def may_go_on(self) -> bool:
        """False after a signal, after a failure, and after too many errors."""
        return not (self._interrupt.is_set or self._failure is not None or self._tally.reason)

    def _round(self, units: Sequence[UnitSpec]) -> list[UnitSpec]:
        """Try units in a pool, then alone, then row by row. Returns the units that are still missing."""
        left = self._pass(units, self._workers.units_in_flight)
        if left and self.may_go_on and (self._workers.units_in_flight > 1 or len(left) < len(units)):
            self._say(f"{len(left)} units were lost with their workers; trying each alone in a worker")
            left = self._pass(left, 1)
        if left and self.may_go_on:
            self._say(f"{len(left)} units end their worker; looking for the rows that do it")
            left = self._quarantine(left)
        return left

    def _pass(self, units: Sequence[UnitSpec], units_in_flight: int) -> list[UnitSpec]:
        lost: Exception | None = None
        with self._watched(units) as (roster, watchdog):
            try:
                pool = self._workers, self._spec, roster, self._reservation
                for receipt in run_units(units, *pool, units_in_flight=units_in_flight):
                    self._take(receipt, roster)
            except ray.exceptions.RayError as error:  # the pool could not be made
                lost = ray_session.cause_of(error)
        left = self._missing()
        if watchdog.has_load_failed:
            self._failure = WorkersFailed(watchdog.tripped)
        elif lost is not None and len(left) == len(units):
            # Not chained: Ray's traceback refers to its executor, which holds the workers' CPUs.
            self._failure = lost
        elif watchdog.tripped is not None:
            self._check_that_any_survives(left, watchdog.tripped)
        return left

    def _quarantine(self, units: Sequence[UnitSpec]) -> list[UnitSpec]:
        for unit in units:
            if not self.may_go_on:
                break
            with self._quarantined([unit]) as (quarantine, roster):
                receipt = quarantine.settle(unit)
                if receipt is not None:
                    self._take(receipt, roster)
                else:
                    self._say(f"{unit.unit_name} was given up: it still ends its worker, or too many of its rows do")
        return self._missing()

    def _check_that_any_survives(self, units: Sequence[UnitSpec], reason: str) -> None:
        with self._quarantined(units) as (quarantine, _):
            if units and not quarantine.does_any_survive(units):
                self._failure = WorkersFailed(f"{reason}; single rows that were tried alone died, too")

    @contextmanager
    def _quarantined(self, units: Sequence[UnitSpec]) -> Iterator[tuple[Quarantine, Any]]:
        with (
            self._watched(units) as (roster, watchdog),
            closing(
                Quarantine(self._spec, roster, watchdog, self._reservation, self._may_convict, self._verdicts)
            ) as quarantine,
        ):
            try:
                yield quarantine, roster
            except ray.exceptions.RayError as error:  # not a worker's death, which the quarantine handles itself
                self._failure = ray_session.cause_of(error, UnitDamaged, OutputStorageError)

    @contextmanager
    def _watched(self, units: Sequence[UnitSpec]) -> Iterator[tuple[Any, Watchdog]]:
        """A roster for the workers of these units. Progress is shown, a watchdog runs, and a signal makes it drain."""
        roster: Any = Roster.remote()
        self._interrupt.on_set = threading.Thread(target=self._drain, args=(roster,), daemon=True).start
        if self._interrupt.is_set:  # the signal came between two rosters
            roster.drain.remote()
        num_rows, num_tokens = sum(unit.num_rows for unit in units), sum(unit.num_tokens for unit in units)
        num_requests = None if self._job.config.task == "generate" else sum(unit.num_requests for unit in units)
        watchdog = Watchdog(
            roster,
            step_timeout_s=self._workers.step_timeout_s,
            max_workers=self._workers.max_size,
            num_commits=lambda: self._tally.commits,
        )
        try:
            with ProgressDisplay(roster, Totals(num_rows, num_tokens, num_requests), quiet=self._quiet), watchdog:
                yield roster, watchdog
        finally:
            # Ray ends a pool's workers once nothing refers to them, but its executor refers to itself. Until garbage is
            # collected they hold the CPUs that the next pool waits for.
            gc.collect()

    def _take(self, receipt: Receipt, roster: Any) -> None:
        self._tally.add(receipt)
        if receipt.is_published:
            self.published.add(receipt.ordinal)
        self._metrics.unit(
            receipt.status,
            rows=receipt.num_rows,
            errors=receipt.errors,
            requested=receipt.num_input_tokens,
            computed=receipt.num_computed_tokens,
            generated=receipt.num_generated_tokens,
        )
        self._metrics.done(self._tally.all_rows)
        failure = receipt.exception
        self._failure = self._failure or failure
        if failure is not None or self._tally.reason:
            roster.drain.remote()

    def _drain(self, roster: Any) -> None:
        """Runs in a thread, since a signal handler may run while Ray holds its locks."""
        roster.drain.remote()
        seconds = f"{self._workers.drain_timeout_s:g} s (workers.drain_timeout_s)"
        self._say(f"interrupted: units in flight have {seconds} to finish; interrupt again to stop at once")

    def _missing(self) -> list[UnitSpec]:
        missing = missing_units(self._job.store, self._manifest, self.published)
        return [unit for unit in missing if unit not in self._given_up]

    def _may_convict(self, unit: UnitSpec, num_convicted: int) -> bool:
        return not self._interrupt.is_set and self._tally.allows_in_unit(unit.num_rows, num_convicted)
