"""What a worker hands back for a unit: its outcome and its counts. For counting only; the shard is the commit.

Knows the errors that a unit can fail with; no Ray.
"""

import json
from dataclasses import asdict, dataclass, field

from segue.pipeline.ledger.shards import ForeignShard
from segue.pipeline.ledger.units import UnitDamaged
from segue.pipeline.problems import WorkersFailed, first_and_last_line
from segue.pipeline.storage.store import OutputStorageError

# Subclasses first: a failure is named after the first that fits.
_EXPECTED: tuple[type[Exception], ...] = (UnitDamaged, ForeignShard, OutputStorageError)


@dataclass(frozen=True, slots=True)
class Receipt:
    """The outcome of one unit."""

    ordinal: int
    status: str  # committed | lost (another attempt was first) | drained | failed
    num_rows: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # rows by error code
    num_planned_errors: int = 0  # those of them that planning found
    num_input_tokens: int = 0
    num_computed_tokens: int = 0
    num_generated_tokens: int = 0
    failure: str | None = None  # the name of an exception's class, and its message
    message: str = ""

    @classmethod
    def of_failure(cls, ordinal: int, error: Exception) -> "Receipt":
        """An expected error is kept as it is; any other is a bug of ours, and becomes WorkersFailed."""
        for kind in _EXPECTED:
            if isinstance(error, kind):
                return cls(ordinal, "failed", failure=kind.__name__, message=str(error))
        message = first_and_last_line(f"{type(error).__name__}: {error}")
        return cls(ordinal, "failed", failure=WorkersFailed.__name__, message=message)

    @property
    def is_published(self) -> bool:
        """Whether the unit's shard was there when the worker looked."""
        return self.status in ("committed", "lost")

    @property
    def exception(self) -> Exception | None:
        """The error that the unit failed with."""
        kinds = {kind.__name__: kind for kind in (*_EXPECTED, WorkersFailed)}
        return kinds[self.failure](self.message) if self.failure else None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Receipt":
        return cls(**json.loads(text))
