"""How far a run is, in tokens: plain lines or one live line on stderr, from the roster's totals.

Knows the roster by its method `totals`, and the terminal; nothing of units or rows.
"""

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

PLAIN_LINE_SECONDS = 10.0
Say = Callable[[str], None]  # gets one line for each event


@dataclass(frozen=True, slots=True)
class Totals:
    """The work of a pass."""

    num_rows: int
    num_tokens: int  # requested prompt tokens of the missing units
    num_requests: int | None = None  # counted instead of rows, if rows have several requests


class ProgressDisplay:
    """A thread that shows the roster's totals: on a terminal one live line, else a plain line every ten seconds."""

    def __init__(self, roster: Any, totals: Totals, *, quiet: bool = False) -> None:
        self._roster = roster
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
                self._show(ray.get(self._roster.totals.remote(), timeout=wait))
        if self._is_terminal:
            print(file=sys.stderr)  # noqa: T201

    def _show(self, totals: dict[str, float]) -> None:
        line = progress_line(totals, self._totals)
        end, start = ("", "\r\x1b[2K") if self._is_terminal else ("\n", "")
        print(start + line, end=end, file=sys.stderr, flush=True)  # noqa: T201


def progress_line(totals: dict[str, float], wanted: Totals) -> str:
    """One line: rows, share of tokens, rate, time left, reuse, errors. Rates count from the first loaded model on."""
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
