"""What a store must do: a folder whose files appear whole, appear once, and are never rewritten.

`create` publishes a file, and succeeds for exactly one of any number of writers. Knows bytes and names; no Parquet, no
Ray. `pipeline/storage/open.py` chooses the store for a path.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import BinaryIO


class OutputStorageError(OSError):
    """The output folder cannot be written or read, or does not hold what was written: no space, no access, gone."""


class Store(ABC):
    """A folder of files. Names are relative, with `/` between their parts."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Publish a file; False if the name exists already, whose file stays as it is. Durable when it returns.

        Raises OutputStorageError.
        """

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError, OutputStorageError if it cannot be read."""

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to read parts of. Raises FileNotFoundError, OutputStorageError, now or while it is read."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file of this name. Raises OutputStorageError if the store cannot tell."""

    @abstractmethod
    def path(self, name: str) -> str:
        """The full path or URL, for people."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """The names directly inside a folder, sorted, those of folders with a `/` at the end; none if it is missing."""

    @abstractmethod
    def is_exclusive(self) -> bool:
        """Whether `create` really lets only one writer win. Where that depends on the server, it is tried out."""

    @abstractmethod
    def overwrite(self, name: str, content: bytes) -> None:
        """Write a file that may exist: only for notes on which nothing depends. Raises OutputStorageError."""

    @abstractmethod
    def discard(self, name: str) -> None:
        """Delete a file that no plan names, if the store allows it."""

    @abstractmethod
    def remove_leftovers(self) -> None:
        """Delete what dead writers left. Only for a complete job: in another, a writer may be at work."""

    def data_names(self) -> list[str]:
        """The names that readers of Parquet folders take for data: those without a leading `_` or `.`."""
        return [name for name in self.names() if not name.startswith(("_", "."))]
