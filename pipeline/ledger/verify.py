"""Whether an output folder still holds what its job wrote: every byte of every shard, against the plan and `_SUCCESS`.

Writes nothing, and reads one shard at a time. Knows Parquet and the store; no model, no Ray.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from segue.pipeline.ledger.manifest import SUCCESS, ForeignOutput, Manifest, window_name
from segue.pipeline.ledger.reading import manifest_of
from segue.pipeline.ledger.shards import ForeignShard, ShardDamaged, check_shard
from segue.pipeline.ledger.units import MAX_READS, UnitDamaged, UnitSpec, load_unit
from segue.pipeline.storage.open import open_store
from segue.pipeline.storage.store import Store

Kind = Literal["missing", "truncated", "changed", "of another job", "foreign", "plan"]


@dataclass(frozen=True, slots=True)
class Damage:
    """One file that is missing, foreign, or not as it was written."""

    kind: Kind
    path: str
    detail: str


@dataclass(slots=True)
class Verification:
    """The state of one output folder."""

    output: str
    status: str = "sound"  # sound | incomplete | damaged
    rows: int = 0  # in sound shards
    shards: int = 0  # sound ones
    missing: int = 0  # shards that the job has not written yet
    damages: list[Damage] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return {"sound": 0, "incomplete": 3, "damaged": 5}[self.status]


@dataclass(frozen=True, slots=True)
class _Record:
    """A shard's entry in `_SUCCESS`."""

    num_bytes: int
    sha256: str


def verify(output: str) -> Verification:
    """Raises ForeignOutput if it is not an output of `segue run`, OutputStorageError if it cannot be read."""
    store = open_store(output)
    # A run at work writes the plan, then shards, then _SUCCESS. They are read in reverse, so none seems to be missing.
    was_done, present = store.exists(SUCCESS), set(store.data_names())
    manifest = manifest_of(output)
    if manifest.task == "finetune":
        raise ForeignOutput(f"{output} is a training's folder; wanted an output of segue run")
    found = Verification(output)
    recorded = _recorded(store, manifest, found) if was_done else None
    planned = {unit.shard_name for unit in manifest.units}
    found.damages += [
        Damage("foreign", store.path(name), "a file that is not in the plan") for name in sorted(present - planned)
    ]
    if recorded is not None and not manifest.is_complete:
        path = store.path(window_name(manifest.num_planned))
        found.damages.append(Damage("plan", path, f"gone, although {SUCCESS} says that the job was done"))
    for unit in manifest.units:
        if unit.shard_name in present:
            _check_present(found, store, manifest, unit, (recorded or {}).get(unit.shard_name))
        else:
            _check_absent(found, store, unit, was_done=recorded is not None)
    found.status = "damaged" if found.damages else "sound" if recorded is not None else "incomplete"
    return found


def _check_present(
    found: Verification, store: Store, manifest: Manifest, unit: UnitSpec, record: _Record | None
) -> None:
    damage = _damage_of(store, manifest, unit, record)
    if damage is None:
        found.rows += unit.num_rows
        found.shards += 1
    else:
        found.damages.append(damage)


def _check_absent(found: Verification, store: Store, unit: UnitSpec, *, was_done: bool) -> None:
    if was_done:
        detail = f"gone, although {SUCCESS} says that it was there"
        found.damages.append(Damage("missing", store.path(unit.shard_name), detail))
        return
    found.missing += 1
    found.damages += _plan_damages(store, unit)


def _recorded(store: Store, manifest: Manifest, found: Verification) -> dict[str, _Record] | None:
    """The entries of `_SUCCESS` by shard name; None if it cannot be parsed."""
    path = store.path(SUCCESS)
    try:
        success = json.loads(store.read(SUCCESS))
        fingerprint = str(success["fingerprint"])
        records = {str(each["name"]): _Record(int(each["bytes"]), str(each["sha256"])) for each in success["shards"]}
    except (ValueError, KeyError, TypeError):
        found.damages.append(Damage("changed", path, "not what a finished job writes"))
        return None
    if fingerprint != manifest.fingerprint:
        detail = f"job {fingerprint}, the plan's is {manifest.fingerprint}"
        found.damages.append(Damage("of another job", path, detail))
    unlisted = [unit.shard_name for unit in manifest.units if unit.shard_name not in records]
    found.damages += [Damage("changed", path, f"does not list {name}") for name in unlisted]
    return records


def _damage_of(store: Store, manifest: Manifest, unit: UnitSpec, record: _Record | None) -> Damage | None:
    """What is wrong with a shard. If it looks damaged it is read again: a byte may have flipped on the way."""
    damage = None
    for _ in range(MAX_READS):
        damage = _damage_in(store.read(unit.shard_name), store.path(unit.shard_name), manifest, unit, record)
        if damage is None:
            break
    return damage


def _damage_in(content: bytes, path: str, manifest: Manifest, unit: UnitSpec, record: _Record | None) -> Damage | None:
    if record is not None and len(content) < record.num_bytes:
        return Damage("truncated", path, f"{len(content):,} bytes, wanted {record.num_bytes:,}")
    try:
        check_shard(content, unit, manifest.fingerprint, path)
    except ForeignShard as error:
        return Damage("of another job", path, str(error))
    except ShardDamaged as error:
        return Damage("changed", path, str(error))
    if record is not None and hashlib.sha256(content).hexdigest() != record.sha256:
        return Damage("changed", path, f"its sha256 is not the one in {SUCCESS}")
    return None


def _plan_damages(store: Store, unit: UnitSpec) -> Iterator[Damage]:
    """What is wrong with the file of a unit that is not answered yet."""
    try:
        load_unit(store, unit)
    except UnitDamaged as error:
        yield Damage("plan", store.path(unit.unit_name), str(error))
