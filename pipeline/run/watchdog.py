"""A thread beside a pass that ends what would never end by itself: a worker that hangs, a run whose workers all die.

Ray notices a process that died, but not one that hangs, and it restarts a dead worker without limit. Knows the roster
and Ray; nothing of units or rows.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from segue.pipeline.run.roster import ANSWER_SECONDS, Health, WorkerProcess

LOOK_SECONDS = 1.0
LOAD_TIMEOUT_SECONDS = 3600.0  # a large model over a slow network
MAX_LOAD_FAILURES = 2  # without a commit between them
MAX_DEATHS, MAX_DEATHS_PER_WORKER = 4, 2  # deaths of processes without a commit between them


@ray.remote(num_cpus=0)
def _kill(process: WorkerProcess) -> None:
    process.kill()


class Watchdog:
    """Watches within its block. `num_commits` returns the number of units committed so far.

    It kills a worker, on any node, whose engine has not finished a step for `step_timeout_s`; Ray restarts the worker.
    When processes die one after the other and nothing is committed, it asks all workers to drain, and `tripped` has the
    reason.
    """

    def __init__(
        self, roster: Any, *, step_timeout_s: float, max_workers: int, num_commits: Callable[[], int] = lambda: 0
    ) -> None:
        self.tripped: str | None = None
        self.has_load_failed = False  # whether that is the reason
        self.killed: set[WorkerProcess] = set()
        self._roster = roster
        self.step_timeout_s = step_timeout_s
        self._max_deaths = MAX_DEATHS + MAX_DEATHS_PER_WORKER * max_workers
        self._num_commits = num_commits
        self._at_last_commit = (0, 0, 0)  # commits; deaths and load failures by then
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="segue-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._thread.join(timeout=2 * ANSWER_SECONDS)

    def _run(self) -> None:
        while not self._is_done.wait(LOOK_SECONDS):
            with suppress(ray.exceptions.RayError):  # the roster restarts, or the cluster shuts down
                health: Any = ray.get(self._roster.health.remote(), timeout=ANSWER_SECONDS)
                self._kill_silent(health)
                self._trip_if_hopeless(health)

    def _kill_silent(self, health: Health) -> None:
        for process, seconds, has_loaded in health.silences:
            limit = self.step_timeout_s if has_loaded else LOAD_TIMEOUT_SECONDS
            if seconds > limit and process not in self.killed:
                self.killed.add(process)
                there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
                ray.get(_kill.options(scheduling_strategy=there).remote(process), timeout=ANSWER_SECONDS)

    def _trip_if_hopeless(self, health: Health) -> None:
        commits, deaths, load_failures = self._num_commits(), health.num_deaths, health.num_load_failures
        if commits > self._at_last_commit[0]:
            self._at_last_commit = (commits, deaths, load_failures)
        since = (deaths - self._at_last_commit[1], load_failures - self._at_last_commit[2])
        if self.tripped is not None or (since[0] < self._max_deaths and since[1] < MAX_LOAD_FAILURES):
            return
        self.has_load_failed = since[1] >= MAX_LOAD_FAILURES
        what = "workers cannot load the model" if self.has_load_failed else f"{since[0]} workers died"
        self.tripped = f"{what}, and nothing was committed meanwhile{_last(health.failures)}"
        self._roster.drain.remote()


def _last(failures: list[str]) -> str:
    return f": {failures[-1]}" if failures else ""
