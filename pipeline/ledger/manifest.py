"""Which job an output folder belongs to: the job's fingerprint and the list of its units. Written once, never changed.

A plan of several windows grows by files: the manifest holds the first window, each later window has a file of its own.

The fingerprint is a mapping of everything that changes results. It is kept readable, so that a refusal can name what
differs. Parallelism, batch sizes, paths of logs and credentials are not in it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

from segue.pipeline.ledger.shards import PROTOCOL
from segue.pipeline.ledger.units import UnitSpec
from segue.pipeline.storage.store import Store
from segue.workers.scoring.template import Task

MANIFEST = "_job/manifest.json"
SUCCESS = "_SUCCESS"
TOP_NODES = 20  # of shared segments that a plan's statistics name
LONGEST_ROWS = 10  # that they name


class ForeignOutput(ValueError):
    """The output folder belongs to another job; the message names what differs."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The plan, as far as it exists."""

    protocol: int
    name: str
    date: str  # what templates print as today's date; frozen at the first run
    fields: dict[str, Any]  # of the fingerprint
    stats: dict[str, Any]  # tokens requested and distinct, top shared segments: what `segue plan` prints
    units: tuple[UnitSpec, ...]  # of all planned windows, in order
    versions: dict[str, str]  # of the packages that computed the plan; for people, never compared
    job: dict[str, Any] = field(default_factory=dict)  # the job file as it was understood; for people, never compared
    num_windows: int = 1  # of the whole dataset
    num_planned: int = 1  # windows that are planned so far

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.fields)

    @property
    def task(self) -> Task:
        return self.fields.get("task", "generate")

    @property
    def num_rows(self) -> int:
        return sum(unit.num_rows for unit in self.units)

    @property
    def num_errors(self) -> int:
        """Rows in which planning found an error."""
        return sum(unit.num_errors for unit in self.units)

    @property
    def errors(self) -> dict[str, int]:
        """The same by error code."""
        return dict(self.stats.get("errors", {}))

    @property
    def is_complete(self) -> bool:
        """Whether all rows are planned."""
        return self.num_planned == self.num_windows

    def with_window(self, units: tuple[UnitSpec, ...], stats: Mapping[str, Any]) -> "Manifest":
        """The plan with its next window."""
        merged = _merge_stats(self.stats, stats)
        return replace(self, units=self.units + units, stats=merged, num_planned=self.num_planned + 1)

    def to_bytes(self) -> bytes:
        """The manifest's file. Only for a plan that has its first window and no other."""
        values = asdict(self)
        del values["num_planned"]
        return json.dumps(values, indent=1, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Manifest":
        values = json.loads(content)
        return cls(units=_units(values.pop("units")), **values)


def fingerprint(fields: Mapping[str, Any]) -> str:
    """sha256 of the fields, 16 hex digits."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def load_manifest(store: Store) -> Manifest | None:
    """The folder's manifest with all planned windows; None if there is no manifest yet. Raises ForeignOutput."""
    try:
        manifest = Manifest.from_bytes(store.read(MANIFEST))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ForeignOutput(f"{store.path(MANIFEST)} is not a manifest of this version: {error}") from error
    if manifest.protocol != PROTOCOL:
        got = f"{store.path(MANIFEST)} is of protocol {manifest.protocol}"
        raise ForeignOutput(f"{got}, wanted {PROTOCOL}: another version of Segue wrote it")
    return load_windows(store, manifest)


def window_name(number: int) -> str:
    """The file of a window, other than the first."""
    return f"_job/windows/window-{number:06d}.json"


def window_to_bytes(manifest: Manifest, units: tuple[UnitSpec, ...], stats: Mapping[str, Any]) -> bytes:
    """The file of a plan's next window."""
    values = {"fingerprint": manifest.fingerprint, "units": [asdict(unit) for unit in units], "stats": stats}
    return json.dumps(values, indent=1, sort_keys=True).encode()


def load_windows(store: Store, manifest: Manifest) -> Manifest:
    """The plan with all windows that were added to it meanwhile. Raises ForeignOutput."""
    while not manifest.is_complete:
        name = window_name(manifest.num_planned)
        try:
            values = json.loads(store.read(name))
            fingerprint, units, stats = values["fingerprint"], _units(values["units"]), values["stats"]
        except FileNotFoundError:
            break
        except (ValueError, TypeError, KeyError) as error:
            raise ForeignOutput(f"{store.path(name)} is not a window of a plan: {error}") from error
        if fingerprint != manifest.fingerprint:
            raise ForeignOutput(f"{store.path(name)} is of job {fingerprint}, wanted {manifest.fingerprint}")
        manifest = manifest.with_window(units, stats)
    return manifest


def check_same_job(found: Manifest, fields: Mapping[str, Any], where: str) -> None:
    """Raises ForeignOutput, which names each field in which the folder's job differs from this one."""
    check_same_fields(found.fields, fields, where)


def check_same_fields(found: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> None:
    """The same for any record that a folder keeps."""
    names = sorted({*found, *fields})
    differing = [name for name in names if found.get(name) != fields.get(name)]
    if differing:
        lines = [f"  {name}: there {_brief(found.get(name))}, here {_brief(fields.get(name))}" for name in differing]
        raise ForeignOutput(
            f"output.path: {where} holds results of another job; it differs in\n"
            + "\n".join(lines)
            + "\nuse another output.path, or the configuration it was started with"
        )


def versions() -> dict[str, str]:
    """The installed versions of the packages that change results."""
    return {name: version(name) for name in ("segue", "torch", "transformers", "ray", "pyarrow")}


def code_version() -> str:
    """The version as major.minor: a patch release never changes results."""
    return ".".join(version("segue").split(".")[:2])


def _merge_stats(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics of two windows, which share no tokens; the requests of the second follow those of the first."""
    after = int(one["num_requests"])
    moved = [node | {"first_request": node["first_request"] + after} for node in other["top_shared"]]
    other = {**other, "top_shared": moved}
    errors = Counter(one.get("errors", {})) + Counter(other.get("errors", {}))
    kept = {
        "top_shared": (TOP_NODES, lambda node: node["tokens_saved"]),
        "undeclared": (TOP_NODES, lambda prefix: prefix["tokens_lost"]),
        "longest": (LONGEST_ROWS, lambda pair: pair[0]),
    }
    merged: dict[str, Any] = {name: one[name] + other[name] for name in one if name not in {*kept, "errors"}}
    merged["errors"] = dict(sorted(errors.items()))
    for name, (size, key) in kept.items():
        merged[name] = sorted([*one[name], *other[name]], key=key, reverse=True)[:size]
    return merged


def _units(values: list[dict[str, Any]]) -> tuple[UnitSpec, ...]:
    return tuple(UnitSpec(**unit) for unit in values)


def _brief(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else f"{text[:197]}..."
