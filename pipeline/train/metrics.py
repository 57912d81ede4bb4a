"""The metrics of a training: written step by step, and watched while they are written.

`pipeline/ledger/training_metrics.py` has the file's name and reads it back. Knows files and lines; no model, no Ray.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from segue.pipeline.ledger.training_metrics import METRICS, read_metrics
from segue.pipeline.storage.folder import LocalStore

if TYPE_CHECKING:
    from segue.workers.training.trainer import EvaluationReport, StepReport

WATCH_SECONDS = 1.0


class MetricsFile:
    """Writes one JSON line for each step and each evaluation.

    `step` is the last step that a resumed training has done: lines of later steps are dropped, since these steps will
    be done again. None: this process writes nothing.
    """

    def __init__(self, store: LocalStore, step: int | None) -> None:
        self._store = store
        self._step = step
        self._file: Any = None

    def __enter__(self) -> "MetricsFile":
        if self._step is None:
            return self
        kept = [line for line in read_metrics(self._store) if line["step"] <= self._step]
        path = self._store.root / METRICS
        temporary = path.with_name(f".tmp-{METRICS}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, event: "StepReport | EvaluationReport") -> None:
        if self._file is not None:
            self._file.write(json.dumps(asdict(event)) + "\n")
            self._file.flush()


@contextmanager
def watched_metrics(store: LocalStore, show: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Within the block `show` gets each new line of the metrics, whichever process writes it."""
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(store, show, done), name="segue-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


def _watch(store: LocalStore, show: Callable[[dict[str, Any]], None], done: threading.Event) -> None:
    """Reads what is new. A resumed training replaces the file by one with the lines of the steps that it has."""
    known = max((line["step"] for line in read_metrics(store)), default=0)
    path, position, inode = store.root / METRICS, 0, -1
    while True:
        is_last = done.wait(WATCH_SECONDS)
        if path.is_file():
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_ino != inode:
                    position, inode = 0, os.fstat(file.fileno()).st_ino
                file.seek(position)
                *lines, _ = file.read().split(b"\n")
            position += sum(len(line) + 1 for line in lines)
            for line in map(json.loads, lines):
                if line["step"] > known:
                    show(line)
        if is_last:
            return
