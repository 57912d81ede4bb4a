"""A folder whose files appear whole, once, and are never rewritten: what a store must do, whatever it is made of.

`create` is the only way in: it succeeds for exactly one of any number of writers. Knows bytes and names; no Parquet,
no Ray.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import BinaryIO


class OutputStorageError(OSError):
    """The output folder cannot be written or read, or does not hold what was written: no space, no permission, gone."""


class Store(ABC):
    """Names are relative, with `/` between their parts."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Publish a file; False if the name exists already, which is left as it is. Durable when it returns.

        Raises OutputStorageError.
        """

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError if it is not there, OutputStorageError if it cannot be read."""

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """For reading a part of a file. Raises FileNotFoundError, OutputStorageError, now or while it is read."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Raises OutputStorageError if it cannot be told."""

    @abstractmethod
    def path(self, name: str) -> str:
        """What a person calls it."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """What is directly inside, sorted, folders with a `/` at the end; nothing if the folder is not there."""

    @abstractmethod
    def is_exclusive(self) -> bool:
        """Whether `create` really lets one writer win, found out by trying where it depends on the store's make."""

    @abstractmethod
    def overwrite(self, name: str, content: bytes) -> None:
        """Write a file that may be there: for notes on which nothing depends. Raises OutputStorageError."""

    @abstractmethod
    def discard(self, name: str) -> None:
        """Delete a file that no plan names, if it can be deleted; a store may forbid it."""

    @abstractmethod
    def remove_leftovers(self) -> None:
        """Delete what dead writers left. Only for a job that is complete: a live one may be writing."""

    def data_names(self) -> list[str]:
        """Those names that readers of Parquet folders take for data: without a leading `_` or `.`."""
        return [name for name in self.names() if not name.startswith(("_", "."))]
