"""Models and adapters in a bucket: each machine downloads them once, into the cache of converted models.

A download is named by the names, sizes and etags of its objects, so another version is another download. Only the files
of a model are fetched, no code. Knows files; whether they are a model is for `workers/models/source.py`.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from segue.pipeline.storage.remote import open_remote
from segue.workers.devices.cache import cache_root
from segue.workers.errors import ModelRefused

SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".gguf")


def local_source(source: str, key: str = "model.source") -> str:
    """The folder or GGUF file on this machine for an `s3://` URL; any other source unchanged.

    Raises ModelRefused, which names the `key` of the job file.
    """
    if not source.startswith("s3://"):
        return source
    try:
        return str(_downloaded(source, key))
    except FileNotFoundError as error:
        raise ModelRefused(f"{key}: there is nothing at {source!r}") from error
    except OSError as error:
        raise ModelRefused(f"{key}: {source!r} cannot be read: {error}") from error


def _downloaded(source: str, key: str) -> Path:
    fs, name = open_remote(source)
    objects = _objects(fs, name)
    if not objects:
        raise ModelRefused(f"{key}: {source!r} has no files of a model ({', '.join(SUFFIXES)})")
    stamp = "\n".join(f"{entry['name']} {entry['size']} {entry.get('ETag')}" for entry in objects)
    digest = hashlib.sha256(stamp.encode()).hexdigest()[:32]
    target = cache_root() / "downloads" / digest
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):  # the workers of a machine start together
        if not target.is_dir():
            _download(fs, objects, target)
    return target / _base(objects[0]) if name.endswith(".gguf") else target


def _objects(fs: Any, name: str) -> list[dict[str, Any]]:
    """The files directly inside a prefix, or the file itself, sorted by name."""
    fs.invalidate_cache()
    found = fs.ls(name, detail=True)
    return sorted(
        (entry for entry in found if entry["type"] == "file" and entry["name"].endswith(SUFFIXES)),
        key=lambda entry: entry["name"],
    )


def _download(fs: Any, objects: list[dict[str, Any]], target: Path) -> None:
    """Download into a folder beside `target` and rename it, so that `target` is never incomplete."""
    scratch = Path(tempfile.mkdtemp(prefix=".downloading-", dir=target.parent))
    try:
        for entry in objects:
            place = scratch / _base(entry)
            fs.get_file(entry["name"], str(place))
            if place.stat().st_size != entry["size"]:
                raise OSError(f"{entry['name']} came with {place.stat().st_size} bytes, wanted {entry['size']}")
        os.rename(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _base(entry: dict[str, Any]) -> str:
    return entry["name"].rpartition("/")[2]
