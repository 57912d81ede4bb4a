"""Which rows ended their worker, kept while a unit is searched for them: after a run that ended meanwhile they would
all be convicted again, and each conviction costs processes.

A verdict holds under the circumstances that it was found in, such as the limit of a step's time; under others it is not
read. Knows the store and row errors; not how rows are convicted.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from segue.pipeline.ledger.units import UnitSpec
from segue.pipeline.storage.store import Store
from segue.workers.errors import RowError, RowErrorCode


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Of one job. `circumstances`: a text that is another one where a verdict might be."""

    store: Store
    circumstances: str

    def load(self, unit: UnitSpec) -> dict[int, RowError]:
        """The errors of the unit's convicted rows, by their place; none if there is no record, or one that is damaged.

        Raises OutputStorageError.
        """
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            record = json.loads(self.store.read(_name(unit)))
            if record["circumstances"] == self.circumstances:
                found = {
                    int(place): RowError(RowErrorCode(code), text) for place, (code, text) in record["rows"].items()
                }
                return {place: error for place, error in found.items() if 0 <= place < unit.num_rows}
        return {}

    def save(self, unit: UnitSpec, convicted: Mapping[int, RowError]) -> None:
        """Raises OutputStorageError."""
        rows = {place: [error.code, error.message] for place, error in convicted.items()}
        record = {"circumstances": self.circumstances, "rows": rows}
        self.store.overwrite(_name(unit), json.dumps(record).encode())

    def forget(self, unit: UnitSpec) -> None:
        """After the unit's shard is there, which holds the errors."""
        self.store.discard(_name(unit))


def _name(unit: UnitSpec) -> str:
    return f"_job/verdicts/{unit.ordinal:06d}-{unit.unit_id}.json"
