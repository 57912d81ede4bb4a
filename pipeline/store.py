"""A folder whose files appear whole, once, and are never rewritten.

`create` is the only way in: it succeeds for exactly one of any number of writers. Local file systems only; the protocol for
object stores is the same with one conditional PUT. Knows bytes and names; no Parquet, no Ray.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"


class OutputStorageError(OSError):
    """The output folder cannot be written or read: no space, no permission, gone."""


class Store:
    """A folder on a local file system."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def create(self, name: str, content: bytes) -> bool:
        """Publish a file; False if the name exists already, which is left as it is. Durable when it returns.

        Temporary file, fsync, link, fsync of the folder: `link` fails where `rename` would overwrite.
        """
        target = self.root / name
        with _storage_errors(target):
            _make_folder(target.parent)
            descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=target.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                    os.fchmod(file.fileno(), 0o666 & ~_umask())
                    file.flush()
                    os.fsync(file.fileno())
                try:
                    os.link(temporary, target)
                except FileExistsError:
                    return False
            finally:
                os.unlink(temporary)
            _sync_folder(target.parent)
        return True

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError if it is not there."""
        with _storage_errors(self.root / name):
            return (self.root / name).read_bytes()

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size

    def path(self, name: str) -> str:
        """For readers that want a path."""
        return str(self.root / name)

    def names(self) -> list[str]:
        """Names of the files directly inside, sorted; none if the folder is not there."""
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(self.root) if entry.is_file())

    def remove_temporaries(self) -> None:
        """Delete what dead writers left. Only for a job that is complete: a live one may be writing."""
        for folder in (self.root, *(p for p in self.root.rglob("*") if p.is_dir())):
            for entry in folder.glob(f"{TEMPORARY_PREFIX}*"):
                entry.unlink(missing_ok=True)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OutputStorageError(error.errno, f"{path}: {error.strerror or error}") from error


def _make_folder(folder: Path) -> None:
    """Like mkdir -p, each new folder made durable in its parent."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's umask; mkstemp ignores it, and output files should follow it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
