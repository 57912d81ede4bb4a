"""The rows of a plan as training examples, and which of them are held out.

A row is held out because of its file, or because of a hash of its path and number. So the same rows are held out in
every order, batch and attempt. An answer is followed by the token that ends it, unless the column `finish_reason`,
which outputs of `segue run` have, says that the answer was cut off at its length. Knows units; no model, no Ray.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from segue.pipeline.ledger.manifest import Manifest
from segue.pipeline.ledger.units import PASSED, PlannedRow, load_unit, planned_rows
from segue.pipeline.storage.store import Store
from segue.workers.rows.params import SamplingParams
from segue.workers.training.batches import TrainingExample

FINISH_REASON = "finish_reason"


@dataclass(frozen=True)
class Holdout:
    """Which rows are held out."""

    src_paths: frozenset[str] | None  # all rows of these files; None: a share of all rows
    fraction: float  # the share
    max_examples: int  # that are evaluated; if a share is held out, the rows beyond are trained on
    seed: int

    def may_have(self, row: PlannedRow) -> bool:
        if self.src_paths is not None:
            return row.src_path in self.src_paths
        return self.place_of(row) < self.fraction

    def place_of(self, row: PlannedRow) -> float:
        """A number from 0 to 1, as good as random."""
        digest = hashlib.blake2b(f"{self.seed}:{row.src_path}:{row.src_row}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64


@dataclass(slots=True)
class TrainingData:
    """The rows of a plan, sorted into their uses."""

    examples: list[TrainingExample] = field(default_factory=list)
    held_out: list[TrainingExample] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)  # rows without an example, by error code


def load_training_data(store: Store, manifest: Manifest, holdout: Holdout, answer_end_id: int) -> TrainingData:
    """All rows of the plan, in the order of the input. Raises UnitDamaged."""
    rows = sorted(_rows(store, manifest, answer_end_id), key=lambda each: (each[0].src_path, each[0].src_row))
    data = TrainingData(errors=Counter(str(row.error.code) for row, _ in rows if row.error is not None))
    good = [(row, example) for row, example in rows if example is not None]
    places = {number: holdout.place_of(row) for number, (row, _) in enumerate(good) if holdout.may_have(row)}
    looked_at = sorted(places, key=places.__getitem__)[: holdout.max_examples]
    kept_out = set(looked_at if holdout.src_paths is None else places)
    data.held_out = [good[number][1] for number in looked_at]
    data.examples = [example for number, (_, example) in enumerate(good) if number not in kept_out]
    return data


def _rows(store: Store, manifest: Manifest, answer_end_id: int) -> Iterator[tuple[PlannedRow, TrainingExample | None]]:
    """Each row with its example; None for a row with an error."""
    for unit in manifest.units:
        table = load_unit(store, unit)
        has_reasons = PASSED + FINISH_REASON in table.column_names
        reasons = table[PASSED + FINISH_REASON].to_pylist() if has_reasons else [None] * len(table)
        for row, reason in zip(planned_rows(table, SamplingParams()), reasons, strict=True):
            end = () if reason == "length" else (answer_end_id,)
            answer = row.score.continuations[0] if row.score is not None else ()
            yield row, TrainingExample(row.score.context, (*answer, *end)) if row.score is not None else None
