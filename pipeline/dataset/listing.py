"""Paths, folders and globs to files: what is there, without opening any of it.

Folders are read recursively. Names that start with `_` or `.` are not read in folders and globs. Links are followed to
files below the input root only, so a dataset cannot reach out of its folder; a file is listed once however many names
it has. Local paths are walked here; other file systems answer through fsspec. Knows nothing of Parquet but its suffix.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from fsspec import AbstractFileSystem
from fsspec.utils import glob_translate

from segue.pipeline.problems import JobRefused, Problem, nearest, shown
from segue.pipeline.storage.remote import open_remote

KEY = "input.path"
SUFFIX = ".parquet"
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file and the state it was seen in."""

    path: str  # absolute path or URL
    size: int  # bytes
    version: str  # changes when the file does: mtime in ns, or the store's etag


@dataclass(slots=True)
class Listing:
    """What one path names."""

    root: str  # the folder that names are relative to
    files: list[ListedFile] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def is_local(path: str) -> bool:
    """Whether a path is one of this machine."""
    return "://" not in path


def has_magic(path: str) -> bool:
    """Whether a path is a glob."""
    return _MAGIC.search(path) is not None


def glob_root(pattern: str) -> str:
    """The folder above the first part of a glob that has a wildcard."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if has_magic(part))
    return "/".join(parts[:first]) or "/"


def list_files(path: str) -> Listing:
    """The files that a file, folder or glob names, by path. Raises JobRefused if it names none, or wrong ones."""
    listing = _list_local(os.path.abspath(path)) if is_local(path) else _list_remote(path)
    if not listing.files and not listing.problems:
        wanted = (
            f"files that match it, {SUFFIX} files in a folder" if has_magic(path) else f"a folder with {SUFFIX} files"
        )
        listing.problems.append(Problem(KEY, f"{shown(path)} with no input file", wanted))
    if listing.problems:
        raise JobRefused(listing.problems)
    listing.files.sort(key=lambda file: file.path)
    return listing


def stamp(path: str) -> ListedFile:
    """The state of one file now. Raises OSError if it is gone."""
    if is_local(path):
        state = os.stat(path)
        return ListedFile(path, state.st_size, f"mtime:{state.st_mtime_ns}")
    fs, name = open_remote(path)
    fs.invalidate_cache()
    return _remote_stamp(fs, fs.info(name))


def is_hidden(relative: str) -> bool:
    """Whether a part of a relative path starts with `_` or `.`, as what is not data does."""
    return any(part.startswith(("_", ".")) for part in PurePosixPath(relative).parts)


def _list_local(path: str) -> Listing:
    if not os.path.lexists(path):
        if has_magic(path):
            return _Walk(glob_root(path), path).listing
        raise JobRefused([_missing(path)])
    if os.path.isdir(path):
        return _Walk(path).listing
    listing = Listing(os.path.dirname(path))
    _add(listing, path)
    return listing


def _missing(path: str) -> Problem:
    folder, name = os.path.split(path)
    try:
        hint = nearest(name, os.listdir(folder))
    except OSError:
        hint = ""
    return Problem(KEY, f"{shown(path)}, which does not exist", "an existing file or folder, or a glob", hint)


def _add(listing: Listing, path: str) -> None:
    """List a local path, unless it is no regular file: opening a pipe would wait for ever."""
    try:
        is_regular = stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        listing.problems.append(Problem(KEY, f"{shown(path)} ({error.strerror})", "a file that is there"))
        return
    if not is_regular:
        listing.problems.append(Problem(KEY, f"{shown(path)}, a pipe, socket or device", "a regular file"))
    elif not path.isprintable():
        listing.problems.append(Problem(KEY, ascii(path), "a file name in UTF-8 without control characters"))
    else:
        listing.files.append(stamp(path))


class _Walk:
    """A folder's files, or those that match a glob; links stay below the root."""

    def __init__(self, root: str, pattern: str = "") -> None:
        self.listing = Listing(root)
        self.real_root = os.path.realpath(root)
        self.matches = re.compile(_translated(pattern)).match if pattern else None
        # A glob without ** cannot match deeper than it is long: no need to walk a whole tree for it.
        self.max_depth = None if "**" in pattern or not pattern else pattern.count("/")
        if os.path.isdir(root):
            self._walk(root, is_folder=not pattern)

    def _walk(self, folder: str, *, is_folder: bool) -> None:
        """`is_folder`: everything with the suffix is wanted, whatever the glob says."""
        for entry in self._entries(folder):
            is_match = entry.name.endswith(SUFFIX) if is_folder or self.matches is None else self.matches(entry.path)
            if entry.is_symlink():
                self._link(entry, bool(is_match))
            elif entry.is_dir():
                whole = is_folder or (bool(is_match) and entry.name.endswith(SUFFIX))
                if whole or self.max_depth is None or entry.path.count("/") < self.max_depth:
                    self._walk(entry.path, is_folder=whole)
            elif is_match:
                _add(self.listing, entry.path)

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            self.listing.problems.append(
                Problem(KEY, f"{shown(folder)} ({error.strerror})", "a folder that can be read")
            )
            return
        yield from (entry for entry in entries if not is_hidden(entry.name))

    def _link(self, entry: os.DirEntry[str], is_match: bool) -> None:
        """Follow a link to a file; one to a folder is skipped if the walk meets that folder anyway."""
        is_folder = os.path.isdir(entry.path)  # no, if it is a loop
        if not is_match and not is_folder:
            return
        inside = os.path.relpath(os.path.realpath(entry.path), self.real_root)
        if inside.startswith("..") or (is_folder and is_hidden(inside)):
            wanted = "links to files below the folder; name the target in input.path to read it"
            self.listing.problems.append(Problem(KEY, f"{shown(entry.path)}, a link out of the input folder", wanted))
        elif not is_folder:
            _add(self.listing, entry.path)


def _translated(pattern: str) -> str:
    try:
        return glob_translate(pattern)
    except ValueError as error:
        raise JobRefused([Problem(KEY, shown(pattern), f"a valid glob: {error}")]) from None


def _list_remote(url: str) -> Listing:
    try:
        fs, name = open_remote(url)
        if has_magic(name) and not fs.exists(name):
            root, found = glob_root(name), fs.glob(name, detail=True)
        elif fs.isdir(name):
            root, found = (
                name,
                {path: info for path, info in fs.find(name, detail=True).items() if path.endswith(SUFFIX)},
            )
        else:
            return Listing(fs.unstrip_protocol(os.path.dirname(name)), [_remote_stamp(fs, fs.info(name))])
    except FileNotFoundError:
        raise JobRefused(
            [Problem(KEY, f"{shown(url)}, which does not exist", "an existing object or prefix")]
        ) from None
    except Exception as error:  # every store has errors of its own; all mean that it cannot be listed
        detail = f"{shown(url)} ({type(error).__name__}: {error})"
        raise JobRefused([Problem(KEY, detail, "a place that can be listed with the credentials at hand")]) from None
    files = [
        info for path, info in found.items() if info["type"] == "file" and not is_hidden(path[len(root) :].strip("/"))
    ]
    return Listing(fs.unstrip_protocol(root), [_remote_stamp(fs, info) for info in files])


def _remote_stamp(fs: AbstractFileSystem, info: dict[str, object]) -> ListedFile:
    version = (
        info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or info.get("created")
    )
    return ListedFile(fs.unstrip_protocol(str(info["name"])), int(str(info["size"])), f"etag:{version}")
