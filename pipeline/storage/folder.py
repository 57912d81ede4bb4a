"""A store in a folder of a file system. To publish: write a temporary file, fsync it, link it, fsync the folder.

`link` fails where `rename` would overwrite, so exactly one of any number of writers wins. Knows bytes and names.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from segue.pipeline.storage.store import OutputStorageError, Store

TEMPORARY_PREFIX = ".tmp-"


class LocalStore(Store):
    """A folder on this machine's file systems, local or mounted."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def create(self, name: str, content: bytes) -> bool:
        target = self.root / name
        temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        with _storage_errors(target):
            _make_folder(target.parent)
            try:
                _write_durably(temporary, content)
                won = _link(temporary, target)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
            if won:
                _sync_folder(target.parent)
        return won

    def read(self, name: str) -> bytes:
        with _storage_errors(self.root / name):
            return (self.root / name).read_bytes()

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        with _storage_errors(self.root / name), (self.root / name).open("rb") as file:
            yield file

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def path(self, name: str) -> str:
        return str(self.root / name)

    def names(self, folder: str = "") -> list[str]:
        inside = self.root / folder
        try:
            with _storage_errors(inside), os.scandir(inside) as entries:
                return sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries)
        except FileNotFoundError:
            return []

    def is_exclusive(self) -> bool:
        return True  # on a file system without links, `link` fails

    def overwrite(self, name: str, content: bytes) -> None:
        target = self.root / name
        temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        with _storage_errors(target):
            _make_folder(target.parent)
            try:
                temporary.write_bytes(content)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    def discard(self, name: str) -> None:
        with suppress(OSError):
            (self.root / name).unlink()

    def remove_leftovers(self) -> None:
        for folder in (self.root, *(p for p in self.root.rglob("*") if p.is_dir())):
            for entry in folder.glob(f"{TEMPORARY_PREFIX}*"):
                entry.unlink(missing_ok=True)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, OutputStorageError):
        raise
    except OSError as error:
        raise OutputStorageError(f"{path}: {error.strerror or error}") from error


def _write_durably(path: Path, content: bytes) -> None:
    """Write a new file to the disk. Its mode follows the umask."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _link(temporary: Path, target: Path) -> bool:
    """Whether this writer published `target`; False if it existed."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except FileNotFoundError:
        # Another run has completed the job and removed our temporary file: then the target exists.
        if target.exists():
            return False
        raise OutputStorageError(f"{target.parent}: files vanish while they are written") from None
    return True


def _make_folder(folder: Path) -> None:
    """Like mkdir -p, and durable: the parent of each new folder is synced."""
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
