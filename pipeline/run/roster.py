"""Who is at work in a run: what each worker process has done, when it last said so, and the word to drain.

One actor, told by workers and asked by the driver. Droppable: nothing about correctness depends on it, since what is
done is what lies in the output. Knows Ray; nothing of units or rows.
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

from segue.pipeline.processes.metrics import EngineMetrics
from segue.pipeline.processes.ray_session import one_line
from segue.workers.engine.stats import EngineStats

REPORT_SECONDS = 0.5
ANSWER_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """One process of a worker. A worker that Ray restarts has the same actor id, and another process."""

    actor_id: str
    node_id: str
    pid: int
    started: float  # as its operating system says: a number may be another process' tomorrow

    @classmethod
    def own(cls) -> "WorkerProcess":
        context, process = ray.get_runtime_context(), psutil.Process()
        return cls(context.get_actor_id() or "", context.get_node_id(), process.pid, process.create_time())

    def kill(self) -> None:
        """From a process on the same node. Nothing if it is gone."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if process.create_time() == self.started:
                process.kill()


@dataclass(slots=True)
class Health:
    """What the roster knows of a pass."""

    num_deaths: int = 0  # processes that a new one has taken the place of
    failures: list[str] = field(default_factory=list)  # what processes said before they ended themselves
    num_load_failures: int = 0  # of these, while they loaded the model
    silences: list[tuple[WorkerProcess, float, bool]] = field(default_factory=list)  # seconds; whether it has loaded


@dataclass(slots=True)
class _Entry:
    process: WorkerProcess
    heard: float
    has_loaded: bool = False


@ray.remote(num_cpus=0, max_restarts=-1)
class Roster:
    """The last word of each worker."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._counters: dict[WorkerProcess, dict[str, float]] = {}
        self._started: float | None = None
        self._draining = False
        self._health = Health()

    def announce(self, process: WorkerProcess) -> bool:
        """A process has started, and goes on to load its model; True if it should stop instead."""
        before = self._entries.get(process.actor_id)
        self._health.num_deaths += before is not None and before.process != process
        self._entries[process.actor_id] = _Entry(process, time.monotonic())
        return self._draining

    def report(self, process: WorkerProcess, stats: dict[str, float]) -> bool:
        """Its counters, now that its model is loaded; True if it should stop."""
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
        """Counters summed over workers, and `seconds` since the first of them was ready; empty until then."""
        if self._started is None:
            return {}
        names = {name for stats in self._counters.values() for name in stats}
        sums = {name: sum(stats.get(name, 0) for stats in self._counters.values()) for name in names}
        return sums | {"seconds": time.monotonic() - self._started}

    def drain(self) -> None:
        """Tell the workers to stop."""
        self._draining = True


class Reporter:
    """A worker's end: sends counters now and then, and does not wait for an answer while there is work."""

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
        """Waits for the answer, so that a worker born into a drain loads nothing and takes no work."""
        self._learn(self._roster.announce.remote(self._process))

    def announce_loaded(self, stats: EngineStats) -> None:
        """Waits for the answer, as the model may have taken long to load."""
        self._learn(self._roster.report.remote(self._process, asdict(stats)))

    def end_process(self, error: BaseException, *, while_loading: bool) -> None:
        """Say why, and end: after an error inside an engine nothing it holds can be trusted, on a GPU least of all."""
        reason = one_line(f"{type(error).__name__}: {error}")
        with suppress(ray.exceptions.RayError):
            ray.get(self._roster.fail.remote(reason, while_loading=while_loading), timeout=ANSWER_SECONDS)
        os._exit(1)

    def _collect(self) -> bool:
        """Whether the last report was answered."""
        done, _ = ray.wait([self._pending], timeout=0)
        if not done:
            return False
        self._learn(done[0])
        return True

    def _learn(self, answer: Any) -> None:
        """Start draining if the answer says so."""
        with suppress(ray.exceptions.RayError):  # the roster died: progress is lost, work is not
            if ray.get(answer, timeout=ANSWER_SECONDS) and not self.is_draining:
                self.is_draining = True
                self._on_drain()
