"""An engine in a thread of its own. Other threads submit batches of rows and wait for their answers.

Batches overlap: rows of several batches are in the engine at once, so it stays full while one batch ends. Knows the
engine's contract (`add`, `step`, `has_work`, `stats`), which `workers/engine/echo.py` also fulfils; no Ray.
"""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Protocol

from segue.workers.engine.stats import EngineStats
from segue.workers.rows.request import EngineRow, RequestOutput


class EngineStopped(Exception):
    """The loop was stopped before the batch was answered."""


class RowEngine(Protocol):
    """The engine as the loop drives it."""

    stats: EngineStats

    @property
    def has_work(self) -> bool: ...

    def add(self, request_id: Hashable, row: EngineRow) -> None: ...

    def step(self) -> list[RequestOutput]: ...


class _Batch:
    """Rows that are answered together."""

    def __init__(self, rows: Sequence[EngineRow]) -> None:
        self.rows = rows
        self.outputs: list[RequestOutput | None] = [None] * len(rows)
        self.num_left = len(rows)
        self.future: Future[list[RequestOutput]] = Future()


class EngineLoop:
    """Owns the engine: one thread makes, drives and drops it, and calls `on_step` after every step."""

    def __init__(
        self, make_engine: Callable[[], RowEngine], on_step: Callable[[EngineStats], None] | None = None
    ) -> None:
        self._make_engine = make_engine
        self._on_step = on_step
        self._inbox: SimpleQueue[_Batch | None] = SimpleQueue()
        self._batches: dict[int, _Batch] = {}
        self._next_id = 0
        self._failure: BaseException | None = None  # set when the thread has ended; nothing is answered after it
        self._stopping = threading.Event()
        self.ready: Future[EngineStats] = Future()  # the live counters, once the model is loaded
        self._thread = threading.Thread(target=self._run, name="segue-engine", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[EngineRow]) -> "Future[list[RequestOutput]]":
        """Answers in the order of `rows`. If the engine fails, the future fails with the same error."""
        batch = _Batch(rows)
        self._inbox.put(batch)
        if self._failure is not None:
            self._fail_all(self._failure)
        return batch.future

    def stop(self) -> None:
        """Give up all unanswered batches: their futures fail with EngineStopped."""
        self._stopping.set()
        self._inbox.put(None)

    def _run(self) -> None:
        try:
            engine = self._make_engine()
        except BaseException as error:
            self.ready.set_exception(error)
            self._fail_all(error)
            return
        self.ready.set_result(engine.stats)
        try:
            while not self._stopping.is_set():
                self._take(engine, wait=not engine.has_work)
                if engine.has_work:
                    started = time.perf_counter()
                    self._deliver(engine.step())
                    engine.stats.step_seconds += time.perf_counter() - started
                if self._on_step is not None:
                    self._on_step(engine.stats)
            self._fail_all(EngineStopped("the engine was stopped"))
        except BaseException as error:
            self._fail_all(error)

    def _take(self, engine: RowEngine, *, wait: bool) -> None:
        """Move batches from the inbox into the engine; block only when there is nothing to do."""
        while not self._stopping.is_set():
            try:
                batch = self._inbox.get(timeout=0.5 if wait else 0)
            except Empty:
                return
            if batch is not None:
                self._start(engine, batch)
            wait = False

    def _start(self, engine: RowEngine, batch: _Batch) -> None:
        if not batch.rows:
            batch.future.set_result([])
            return
        number = self._next_id
        self._next_id += 1
        self._batches[number] = batch
        for index, row in enumerate(batch.rows):
            engine.add((number, index), row)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            number, index = output.request_id  # type: ignore[misc]
            batch = self._batches[number]
            batch.outputs[index] = output
            batch.num_left -= 1
            if not batch.num_left:
                del self._batches[number]
                batch.future.set_result([each for each in batch.outputs if each is not None])

    def _fail_all(self, error: BaseException) -> None:
        """Every batch, and every one still to come, ends with this error."""
        self._failure = error
        batches = list(self._batches.values())
        self._batches.clear()
        while True:
            for batch in batches:
                if not batch.future.done():
                    batch.future.set_exception(error)
            try:
                batch = self._inbox.get_nowait()
            except Empty:
                return
            batches = [] if batch is None else [batch]
