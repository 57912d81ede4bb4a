"""A text file whose lines are made in any order and stand in the order of their rows: complete, or not there.

Lines wait in a file beside it; keys (24 bytes a line) are held in memory. Knows lines and keys; not what they say.
"""

import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import BinaryIO

import numpy as np

from segue.pipeline.problems import JobRefused, Problem, shown


class OrderedLines:
    """Use it as a context manager: after an error nothing is left. Raises JobRefused if the file cannot be written."""

    def __init__(self, path: str, key: str = "TARGET") -> None:
        """`key`: of the argument that names the file, for messages."""
        self._path, self._key = path, key
        self._waiting, self._sorted = f"{path}.waiting", f"{path}.part"
        self._groups: dict[str, int] = {}
        self._group_of, self._row_of, self._begin = array("q"), array("q"), array("q", [0])
        self._file: BinaryIO = self._open(self._waiting, "wb")

    def __enter__(self) -> "OrderedLines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._file.close()
        for left in (self._waiting, self._sorted):
            with suppress(OSError):
                os.unlink(left)

    def __len__(self) -> int:
        return len(self._row_of)

    def add(self, group: str, row: int, line: str) -> None:
        """A line with its line break. Groups stand by name, rows of a group by number."""
        try:
            size = self._file.write(line.encode("utf-8"))
        except OSError as error:
            raise self._unwritten(error) from None
        self._begin.append(self._begin[-1] + size)
        self._group_of.append(self._groups.setdefault(group, len(self._groups)))
        self._row_of.append(row)

    def close(self, first: str = "") -> None:
        """Give the file its lines, after `first`, and then its name."""
        try:
            self._file.close()
            with ExitStack() as stack:
                waiting = stack.enter_context(self._open(self._waiting, "rb"))
                target = stack.enter_context(self._open(self._sorted, "wb"))
                target.write(first.encode("utf-8"))
                for place in self._order():
                    waiting.seek(self._begin[place])
                    target.write(waiting.read(self._begin[place + 1] - self._begin[place]))
            os.replace(self._sorted, self._path)
        except OSError as error:
            raise self._unwritten(error) from None

    def _order(self) -> Iterator[int]:
        rank = {number: place for place, (_, number) in enumerate(sorted(self._groups.items()))}
        ranks = np.array([rank[number] for number in range(len(rank))], np.int64)
        groups = np.frombuffer(self._group_of, np.int64) if self._group_of else np.empty(0, np.int64)
        rows = np.frombuffer(self._row_of, np.int64) if self._row_of else np.empty(0, np.int64)
        return map(int, np.lexsort((rows, ranks[groups])))

    def _open(self, path: str, mode: str) -> BinaryIO:
        try:
            return open(path, mode)  # type: ignore[return-value]
        except OSError as error:
            raise self._unwritten(error) from None

    def _unwritten(self, error: OSError) -> JobRefused:
        got = f"{shown(self._path)} ({error.strerror})"
        return JobRefused([Problem(self._key, got, "a file that can be written")])
