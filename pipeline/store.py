"""A folder whose files appear whole, once, and are never rewritten.

`create` is the only way in: it succeeds for exactly one of any number of writers. Local file systems only; the protocol
for object stores is the same with one conditional PUT. Knows bytes and names; no Parquet, no Ray.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"


class OutputStorageError(OSError):
    """The output folder cannot be written or read, or does not hold what was written: no space, no permission, gone."""


class Store:
    """A folder on a local file system."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def create(self, name: str, content: bytes) -> bool:
        """Publish a file; False if the name exists already, which is left as it is. Durable when it returns.

        Temporary file, fsync, link, fsync of the folder: `link` fails where `rename` would overwrite. Raises
        OutputStorageError.
        """
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
        """Raises FileNotFoundError if it is not there, OutputStorageError if it cannot be read."""
        with _storage_errors(self.root / name):
            return (self.root / name).read_bytes()

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def path(self, name: str) -> str:
        """For readers that want a path."""
        return str(self.root / name)

    def names(self) -> list[str]:
        """What is directly inside, sorted, folders with a `/` at the end; nothing if the folder is not there."""
        try:
            with _storage_errors(self.root), os.scandir(self.root) as entries:
                return sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries)
        except FileNotFoundError:
            return []

    def data_names(self) -> list[str]:
        """Those names that readers of Parquet folders take for data: without a leading `_` or `.`."""
        return [name for name in self.names() if not name.startswith(("_", "."))]

    def remove_temporaries(self) -> None:
        """Delete what dead writers left. Only for a job that is complete: a live one may be writing."""
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
    """A new file, whose mode follows the umask."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _link(temporary: Path, target: Path) -> bool:
    """Whether `target` is ours now; False if it was there."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except FileNotFoundError:
        # Another run completed the job and cleaned up under our hands: then the target is there.
        if target.exists():
            return False
        raise OutputStorageError(f"{target.parent}: files vanish while they are written") from None
    return True


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
