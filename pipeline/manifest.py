"""What an output folder belongs to: the job's fingerprint and the list of its units. Written once, never changed.

The fingerprint is a mapping of everything that changes results, kept readable so that a refusal can name what differs.
Parallelism, batch sizes, paths of logs and credentials are not in it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from pipeline.store import Store
from pipeline.units import UnitSpec

MANIFEST = "_job/manifest.json"
SUCCESS = "_SUCCESS"


class ForeignOutput(ValueError):
    """The output folder belongs to another job; the message names what differs."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The plan, as persisted."""

    protocol: int
    name: str
    date: str  # shown by templates that print today's; frozen at the first run
    fields: dict[str, Any]  # the fingerprint's
    stats: dict[str, Any]  # tokens requested and distinct, top shared segments: what `segue plan` prints
    units: tuple[UnitSpec, ...]
    versions: dict[str, str]  # of what computed the plan; told, not compared
    job: dict[str, Any] = field(default_factory=dict)  # the job file as it was understood; told, not compared

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.fields)

    @property
    def num_rows(self) -> int:
        return sum(unit.num_rows for unit in self.units)

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Manifest":
        values = json.loads(content)
        units = tuple(UnitSpec(**unit) for unit in values.pop("units"))
        return cls(units=units, **values)


def fingerprint(fields: Mapping[str, Any]) -> str:
    """sha256 over the fields, 16 hex digits."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def load_manifest(store: Store) -> Manifest | None:
    """The folder's manifest, None if it has none yet."""
    try:
        return Manifest.from_bytes(store.read(MANIFEST))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ForeignOutput(f"{store.path(MANIFEST)} is not a manifest of this version: {error}") from error


def check_same_job(found: Manifest, fields: Mapping[str, Any], where: str) -> None:
    """Raises ForeignOutput naming each field in which the folder's job differs from this one."""
    check_same_fields(found.fields, fields, where)


def check_same_fields(found: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> None:
    """`check_same_job` for any record of a folder."""
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
    """Installed versions of what computes."""
    return {name: version(name) for name in ("segue", "torch", "transformers", "ray", "pyarrow")}


def code_version() -> str:
    """major.minor: a patch never changes results."""
    return ".".join(version("segue").split(".")[:2])


def _brief(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else f"{text[:197]}..."
