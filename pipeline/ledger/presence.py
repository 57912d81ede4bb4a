"""Which runs are at work on an output folder: each run keeps a note in `_job/runs/` and renews it while it lasts.

The notes are for people. Nothing depends on them: two runs that know nothing of each other are just as safe.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import psutil

from segue.pipeline.storage.store import OutputStorageError, Store

FOLDER = "_job/runs"
RENEW_SECONDS = 10.0
FRESH_SECONDS = 45.0  # a run whose note is older has died


@dataclass(frozen=True, slots=True)
class RunNote:
    """What a run says of itself. Times are seconds since 1970, by the run's own clock."""

    host: str
    pid: int
    started: float
    renewed: float
    has_ended: bool = False

    @property
    def is_at_work(self) -> bool:
        if self.has_ended or time.time() - self.renewed > FRESH_SECONDS:
            return False
        return self.host != socket.gethostname() or psutil.pid_exists(self.pid)


def runs_at_work(store: Store) -> dict[str, RunNote]:
    """The notes of runs that are at work now, by file name. Raises OutputStorageError."""
    return {name: note for name, note in _notes(store) if note.is_at_work}


def times_at_work(store: Store) -> list[tuple[float, float]]:
    """(begin, end so far) of every run, in order, each by its own clock. Raises OutputStorageError."""
    return sorted((note.started, max(note.started, note.renewed)) for _, note in _notes(store))


class Presence:
    """Within the block this run's note says that it is at work. `say` is told once of every other run at work."""

    def __init__(self, store: Store, say: Callable[[str], object]) -> None:
        self._store = store
        self._say = say
        self._name = f"{uuid.uuid4().hex}.json"
        self._told: set[str] = set()
        now = time.time()
        self._note = RunNote(socket.gethostname(), os.getpid(), now, now)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="segue-presence", daemon=True)

    def __enter__(self) -> "Presence":
        self._renew()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(timeout=RENEW_SECONDS)
        self._note = replace(self._note, has_ended=True)
        self._write()

    def _run(self) -> None:
        while not self._is_over.wait(RENEW_SECONDS):
            self._renew()

    def _renew(self) -> None:
        self._note = replace(self._note, renewed=time.time())
        self._write()
        with suppress(OutputStorageError):
            others = runs_at_work(self._store)
            for name in others.keys() - {self._name} - self._told:
                self._told.add(name)
                self._say(_sentence_of(others[name]))

    def _write(self) -> None:
        # FileNotFoundError: a run that has just finished cleans up, and removes our temporary file.
        with suppress(OutputStorageError, FileNotFoundError):
            self._store.overwrite(f"{FOLDER}/{self._name}", json.dumps(asdict(self._note)).encode())


def _notes(store: Store) -> Iterator[tuple[str, RunNote]]:
    for name in store.names(FOLDER):
        with suppress(ValueError, TypeError, FileNotFoundError):  # not a note, or one that is being written now
            yield name, RunNote(**json.loads(store.read(f"{FOLDER}/{name}")))


def _sentence_of(note: RunNote) -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(note.started))
    return (
        f"another run is at work on this output: process {note.pid} on {note.host}, since {started}; "
        "each row is written once, but units may be computed twice"
    )
