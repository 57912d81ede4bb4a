"""What an output folder still lacks, and the last write, which says that it is complete.

What is missing is always the plan minus the listing, never a count of receipts. Knows the plan and the store; no Ray.
"""

import hashlib
import json
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor

from segue.pipeline.ledger.manifest import SUCCESS, ForeignOutput, Manifest, load_windows, window_name
from segue.pipeline.ledger.shards import read_shard
from segue.pipeline.ledger.units import UnitSpec
from segue.pipeline.problems import JobRefused, Problem, shown
from segue.pipeline.storage.store import OutputStorageError, Store

READERS = 4  # shards read at once


def check_unused(store: Store) -> None:
    """For a folder without a manifest. Raises ForeignOutput if it holds data, which belongs to somebody else.

    Raises JobRefused for a store in which two writers could both win.
    """
    names = store.data_names()
    if names:
        raise ForeignOutput(
            f"output.path: {store.path('')} is not empty ({names[0]}) and not an output of Segue; "
            "wanted a new or empty folder"
        )
    if not store.is_exclusive():
        wanted = "a store that honours If-None-Match; this one overwrites what is there"
        raise JobRefused([Problem("output.path", shown(store.path("")), wanted)])


def check_complete(store: Store, manifest: Manifest) -> None:
    """For a folder with `_SUCCESS`. Raises OutputStorageError if shards or parts of the plan are gone since then."""
    if not manifest.is_complete:
        raise OutputStorageError(
            f"{store.path(window_name(manifest.num_planned))} is gone although {store.path(SUCCESS)} says that the "
            "job was done; put it back"
        )
    gone = missing_units(store, manifest)
    if gone:
        raise OutputStorageError(
            f"{store.path(gone[0].shard_name)} is gone although {store.path(SUCCESS)} says that it was there; "
            f"put it back, or remove {SUCCESS} to compute it again"
        )


def missing_units(store: Store, manifest: Manifest, published: Container[int] = ()) -> list[UnitSpec]:
    """The plan minus the listing. Of units whose ordinals are in `published` the name itself is looked up, too: NFS may
    list a folder as it was up to a minute ago.

    Raises ForeignOutput for a file that looks like data and is not in the plan, OutputStorageError.
    """
    present = set(store.data_names())
    strangers = present - _shard_names(manifest)
    if strangers and not manifest.is_complete:
        strangers -= _shard_names(load_windows(store, manifest))  # another run may have planned more
    if strangers:
        raise ForeignOutput(f"output.path: {store.path(min(strangers))} is not a shard of this job; move it away")
    missing = [unit for unit in manifest.units if unit.shard_name not in present]
    return [unit for unit in missing if unit.ordinal not in published or not store.exists(unit.shard_name)]


def _shard_names(manifest: Manifest) -> set[str]:
    return {unit.shard_name for unit in manifest.units}


def write_success(store: Store, manifest: Manifest) -> None:
    """The last write: it lists every shard with size and checksum, after each was read and checked against the plan."""

    def entry(unit: UnitSpec) -> dict[str, object]:
        footer, content = read_shard(store, unit, manifest.fingerprint)
        digest = hashlib.sha256(content).hexdigest()
        return {"name": unit.shard_name, "rows": footer.num_rows, "bytes": len(content), "sha256": digest}

    with ThreadPoolExecutor(READERS) as pool:
        shards = list(pool.map(entry, manifest.units))
    record = {"fingerprint": manifest.fingerprint, "rows": manifest.num_rows, "shards": shards}
    store.create(SUCCESS, json.dumps(record, indent=1).encode())
    store.remove_leftovers()
