"""The rows of a plan as training examples, and which of them are held out.

A row is held out by its file, or by a hash of where it comes from: the same rows whatever the order, batch or attempt.
Knows units; no model, no Ray.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.manifest import Manifest
from pipeline.store import Store
from pipeline.units import PlannedRow, load_unit, planned_rows
from workers.sampling import SamplingParams
from workers.training_batches import TrainingExample


@dataclass(frozen=True)
class Holdout:
    """Which rows are held out."""

    src_paths: frozenset[str] | None  # all rows of these files; None: a share of all rows
    fraction: float
    max_examples: int
    seed: int

    def has(self, row: PlannedRow) -> bool:
        if self.src_paths is not None:
            return row.src_path in self.src_paths
        return self.place_of(row) < self.fraction

    def place_of(self, row: PlannedRow) -> float:
        """From 0 to 1, as good as random."""
        digest = hashlib.blake2b(f"{self.seed}:{row.src_path}:{row.src_row}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64


@dataclass(slots=True)
class TrainingData:
    """A plan's rows."""

    examples: list[TrainingExample] = field(default_factory=list)
    held_out: list[TrainingExample] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)  # rows that are neither, by code


def load_training_data(store: Store, manifest: Manifest, holdout: Holdout, answer_end_id: int) -> TrainingData:
    """Every row of the plan, in the order of the input. Raises UnitDamaged."""
    rows = sorted(_rows(store, manifest), key=lambda row: (row.src_path, row.src_row))
    data = TrainingData(errors=Counter(str(row.error.code) for row in rows if row.error is not None))
    good = [row for row in rows if row.error is None]
    data.examples = [_example(row, answer_end_id) for row in good if not holdout.has(row)]
    held_out = sorted((row for row in good if holdout.has(row)), key=holdout.place_of)[: holdout.max_examples]
    data.held_out = [_example(row, answer_end_id) for row in held_out]
    return data


def _rows(store: Store, manifest: Manifest) -> Iterable[PlannedRow]:
    for unit in manifest.units:
        yield from planned_rows(load_unit(store, unit), SamplingParams())


def _example(row: PlannedRow, answer_end_id: int) -> TrainingExample:
    if row.score is None:
        raise ValueError("a plan for training has an answer in every row")
    return TrainingExample(row.score.context, (*row.score.continuations[0], answer_end_id))
