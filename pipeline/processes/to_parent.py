"""What a child process tells its parent while it works: values, and that its clock goes on or stops.

Knows one connection; nothing of limits or rows.
"""

import threading
import time
from multiprocessing.connection import Connection

TICK_SECONDS = 0.5


class ToParent:
    """A child's connection to its parent; may be used from any thread.

    A wait is told to the parent only if it lasts, by a thread: most reads of a file are over before.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.RLock()
        self._last = 0.0
        self._waiting_since: float | None = None
        self._is_paused = False

    def send(self, kind: str, value: object = None) -> None:
        with self._lock:
            self._connection.send((kind, value))
            self._last = time.monotonic()

    def begin_wait(self) -> None:
        self._waiting_since = time.monotonic()

    def end_wait(self) -> None:
        with self._lock:
            self._waiting_since = None
            if self._is_paused:
                self._is_paused = False
                self.send("tick")

    def tell_long_wait(self) -> None:
        """Stop the clock if the wait that there is has lasted for a while."""
        with self._lock:
            since = self._waiting_since
            if since is not None and not self._is_paused and time.monotonic() - since > TICK_SECONDS:
                self._is_paused = True
                self.send("pause")

    def tick(self) -> None:
        if time.monotonic() - self._last > TICK_SECONDS:
            self.send("tick")
