"""How far a run is, in tokens: an actor that workers tell, and lines or a live bar on stderr that show it.

Droppable: nothing about correctness depends on it. The same channel tells workers that the run is being drained.
"""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import ray
import ray.exceptions

from workers.stats import EngineStats

REPORT_SECONDS = 0.5
ANSWER_SECONDS = 30.0
PLAIN_LINE_SECONDS = 10.0


@ray.remote(num_cpus=0)
class ProgressActor:
    """The last counters of each worker."""

    def __init__(self) -> None:
        self._workers: dict[str, dict[str, int]] = {}
        self._started: float | None = None
        self._draining = False

    def report(self, worker: str, stats: dict[str, int]) -> bool:
        """Remember a worker's counters; True if it should stop."""
        self._workers[worker] = stats
        self._started = self._started or time.monotonic()
        return self._draining

    def totals(self) -> dict[str, float]:
        """Counters summed over workers, and `seconds` since the first of them was ready; empty until then."""
        if self._started is None:
            return {}
        names = {name for stats in self._workers.values() for name in stats}
        sums = {name: sum(stats.get(name, 0) for stats in self._workers.values()) for name in names}
        return sums | {"seconds": time.monotonic() - self._started}

    def drain(self) -> None:
        """Tell the workers to stop."""
        self._draining = True


class Reporter:
    """A worker's end: sends counters now and then, and never waits for an answer."""

    def __init__(self, actor: Any, worker: str, on_drain: Callable[[], None]) -> None:
        self._actor = actor
        self._worker = worker
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
        self._pending = self._actor.report.remote(self._worker, asdict(stats))

    def announce(self, stats: EngineStats) -> None:
        """The model is loaded. Waits for the answer, so that a worker born into a drain takes no work."""
        self._learn(self._actor.report.remote(self._worker, asdict(stats)))

    def _collect(self) -> bool:
        """Whether the last report was answered."""
        done, _ = ray.wait([self._pending], timeout=0)
        if not done:
            return False
        self._learn(done[0])
        return True

    def _learn(self, answer: Any) -> None:
        """Start draining if the answer says so."""
        with suppress(ray.exceptions.RayError):  # the actor died: progress is lost, work is not
            if ray.get(answer, timeout=ANSWER_SECONDS) and not self.is_draining:
                self.is_draining = True
                self._on_drain()


@dataclass(frozen=True, slots=True)
class Totals:
    """What the run has to do, from the plan and the listing."""

    num_rows: int
    num_tokens: int  # requested prompt tokens of missing units
    num_requests: int | None = None  # where rows have several, what is counted instead of them


class ProgressDisplay:
    """A thread that shows the actor's totals: a live line on a terminal, else a plain line every ten seconds."""

    def __init__(self, actor: Any, totals: Totals, *, quiet: bool = False) -> None:
        self._actor = actor
        self._totals = totals
        self._done = threading.Event()
        self._is_terminal = sys.stderr.isatty()
        self._thread = threading.Thread(target=self._run, name="segue-progress", daemon=True)
        if not quiet:
            self._thread.start()

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        wait = 1.0 if self._is_terminal else PLAIN_LINE_SECONDS
        while not self._done.wait(wait):
            with suppress(ray.exceptions.RayError):
                self._show(ray.get(self._actor.totals.remote(), timeout=wait))
        if self._is_terminal:
            print(file=sys.stderr)  # noqa: T201

    def _show(self, totals: dict[str, float]) -> None:
        line = progress_line(totals, self._totals)
        end, start = ("", "\r\x1b[2K") if self._is_terminal else ("\n", "")
        print(start + line, end=end, file=sys.stderr, flush=True)  # noqa: T201


def progress_line(totals: dict[str, float], wanted: Totals) -> str:
    """One line: rows, share of tokens, rate, time left, reuse, errors. Rates are since the first model was loaded."""
    rows, tokens, seconds = (totals.get(name, 0) for name in ("num_finished_rows", "num_finished_tokens", "seconds"))
    total = f"{wanted.num_rows:,} rows" if wanted.num_requests is None else f"{wanted.num_requests:,} requests"
    if not totals:
        return f"0/{total} | loading the model"
    generated, computed = totals.get("num_generated_tokens", 0), totals.get("num_computed_tokens", 0)
    requested = totals.get("num_prompt_tokens", 0)
    share = tokens / wanted.num_tokens if wanted.num_tokens else 1.0
    left = f"{_clock(seconds * (1 - share) / share)} left" if share and seconds else "estimating"
    rate = f"{(computed + generated) / seconds:,.0f}" if seconds else "0"
    reused = 1 - computed / requested if requested else 0.0
    return (
        f"{rows:,}/{total} | {share:.0%} of {wanted.num_tokens:,} prompt tokens, "
        f"{rate} tokens/s computed | {left} | "
        f"{max(0.0, reused):.0%} reused | {totals.get('num_errors', 0)} errors"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
