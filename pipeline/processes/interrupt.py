"""SIGINT and SIGTERM as a request to drain: after the first, units in flight may finish; the second ends at once.

Knows signals; nothing of Ray or jobs.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Handles the signals within its block. In threads other than the main one it does nothing."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.on_set: Callable[[], object] | None = None  # called at the first signal; None: the first ends, too
        self._previous: dict[int, Any] = {}

    @property
    def is_set(self) -> bool:
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """The exit code that a shell reports for a process ended by the signal."""
        return 128 + (self.signum or 0)

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self.install()
        return self

    def install(self) -> None:
        """Handle the signals from now on. Call it again after a library has taken them."""
        for signum in SIGNALS:
            previous = signal.signal(signum, self._handle)
            self._previous.setdefault(signum, previous)

    def __exit__(self, *_: object) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.is_set or self.on_set is None:
            raise SystemExit(128 + signum)
        self.signum = signum
        self.on_set()
