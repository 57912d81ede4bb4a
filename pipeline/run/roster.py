"""The workers of a pass: what each process has done, when it last reported, and the request to drain.

One actor: workers report to it, the driver asks it. If it dies only progress is lost, since the output folder says what
is done. Knows Ray; nothing of units or rows.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import ray
import ray.exceptions

from segue.pipeline.problems import first_and_last_line
from segue.pipeline.processes.metrics import EngineMetrics
from segue.workers.engine.stats import EngineStats

REPORT_SECONDS = 0.5
ANSWER_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """One process of a worker. After Ray restarts a worker it has the same actor id and another process."""

    actor_id: str
    node_id: str
    pid: int
    started: float  # by its operating system, which may give the pid to another process later

    @classmethod
    def own(cls) -> "WorkerProcess":
        context, process = ray.get_runtime_context(), psutil.Process()
        return cls(context.get_actor_id() or "", context.get_node_id(), process.pid, process.create_time())

    def kill(self) -> None:
        """To be called on the same node. Does nothing if the process is gone."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if process.create_time() == self.started:
                process.kill()


@dataclass(slots=True)
class Health:
    """What the roster knows of a pass."""

    num_deaths: int = 0  # processes that a new one has replaced
    failures: list[str] = field(default_factory=list)  # why processes ended themselves
    num_load_failures: int = 0  # those of them that were loading the model
    # Of each process the seconds since its last report, and whether it has loaded the model.
    silences: list[tuple[WorkerProcess, float, bool]] = field(default_factory=list)


@dataclass(slots=True)
class _Entry:
    process: WorkerProcess
    heard: float
    has_loaded: bool = False


@ray.remote(num_cpus=0, max_restarts=-1)
class Roster:
    """The last report of each worker, and whether workers should drain."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._counters: dict[WorkerProcess, dict[str, float]] = {}
        self._started: float | None = None
        self._draining = False
        self._health = Health()

    def announce(self, process: WorkerProcess) -> bool:
        """A process has started and will load its model. True if it should stop instead."""
        before = self._entries.get(process.actor_id)
        self._health.num_deaths += before is not None and before.process != process
        self._entries[process.actor_id] = _Entry(process, time.monotonic())
        return self._draining

    def report(self, process: WorkerProcess, stats: dict[str, float]) -> bool:
        """The counters of a process that has loaded its model. True if it should stop."""
        self._counters[process] = stats
        self._started = self._started or time.monotonic()
        self._entries[process.actor_id] = _Entry(process, time.monotonic(), has_loaded=True)
        return self._draining

    def fail(self, reason: str, *, while_loading: bool) -> None:
        """A process is about to end itself."""
        self._health.failures.append(reason)
        self._health.num_load_failures += while_loading

    def health(self) -> Health:
        now = time.monotonic()
        self._health.silences = [(e.process, now - e.heard, e.has_loaded) for e in self._entries.values()]
        return self._health

    def totals(self) -> dict[str, float]:
        """The counters summed over workers, and `seconds` since the first worker was ready; empty until then."""
        if self._started is None:
            return {}
        names = {name for stats in self._counters.values() for name in stats}
        sums = {name: sum(stats.get(name, 0) for stats in self._counters.values()) for name in names}
        return sums | {"seconds": time.monotonic() - self._started}

    def drain(self) -> None:
        """Ask the workers to stop; each hears it with its next report."""
        self._draining = True


class Reporter:
    """A worker's side: sends counters from time to time, and does not wait for the answer while there is work."""

    def __init__(self, roster: Any, on_drain: Callable[[], None], metrics: EngineMetrics) -> None:
        self._roster = roster
        self._metrics = metrics
        self._process = WorkerProcess.own()
        self._on_drain = on_drain
        self._pending: Any = None
        self._sent = 0.0
        self.is_draining = False

    def __call__(self, stats: EngineStats) -> None:
        if time.monotonic() - self._sent < REPORT_SECONDS:
            return
        if self._pending is not None and not self._collect():
            return
        self._sent = time.monotonic()
        self._metrics(stats)
        self._pending = self._roster.report.remote(self._process, asdict(stats))

    def announce(self) -> None:
        """Waits for the answer, so that a worker that starts during a drain loads nothing and takes no work."""
        self._learn(self._roster.announce.remote(self._process))

    def announce_loaded(self, stats: EngineStats) -> None:
        """Waits for the answer: while the model loaded, a drain may have begun."""
        self._learn(self._roster.report.remote(self._process, asdict(stats)))

    def end_process(self, error: BaseException, *, while_loading: bool) -> None:
        """Report the reason and end the process: its state cannot be trusted after an error, least of all on a GPU."""
        reason = first_and_last_line(f"{type(error).__name__}: {error}")
        with suppress(ray.exceptions.RayError):
            ray.get(self._roster.fail.remote(reason, while_loading=while_loading), timeout=ANSWER_SECONDS)
        os._exit(1)

    def _collect(self) -> bool:
        """Take the answer to the last report; False if there is none yet."""
        done, _ = ray.wait([self._pending], timeout=0)
        if not done:
            return False
        self._learn(done[0])
        return True

    def _learn(self, answer: Any) -> None:
        """Start to drain if the answer says so."""
        with suppress(ray.exceptions.RayError):  # the roster died, which costs progress and no work
            if ray.get(answer, timeout=ANSWER_SECONDS) and not self.is_draining:
                self.is_draining = True
                self._on_drain()
