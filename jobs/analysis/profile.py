"""An output folder in numbers, finished or not: lengths, answers, errors with examples, samples.

Reads the few columns that it needs once, a shard at a time, so memory does not grow with the number of rows. Knows
outputs; draws nothing.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from segue.pipeline.ledger.manifest import ForeignOutput, Manifest
from segue.pipeline.ledger.presence import times_at_work
from segue.pipeline.ledger.reading import manifest_of, read_columns, sample_rows
from segue.pipeline.ledger.status import JobStatus, status_of
from segue.pipeline.ledger.totals import committed_footers
from segue.pipeline.storage.open import open_store

EXAMPLES = 3  # of each error code
MAX_ANSWERS = 10_000  # different answers; a job with more has free texts, and counts of those say nothing
MAX_ANSWER_CHARS = 80
SAMPLE_SEED = 0
COLUMNS = (
    "src_path", "src_row", "error", "num_input_tokens", "num_generated_tokens", "generated_text", "finish_reason",
    "choice", "correct",
)  # fmt: skip


@dataclass(slots=True)
class Histogram:
    """How many rows have each length. There are at most as many lengths as positions in a context."""

    counts: Counter[int] = field(default_factory=Counter)

    @property
    def num(self) -> int:
        return self.counts.total()

    @property
    def total(self) -> int:
        return sum(value * count for value, count in self.counts.items())

    @property
    def largest(self) -> int:
        return max(self.counts, default=0)

    @property
    def mean(self) -> float:
        return self.total / self.num if self.counts else 0.0

    def bins(self, at_most: int) -> list[tuple[int, int, int]]:
        """(smallest value, largest value, count) of each bin. All are equally wide: 1, 2 or 5 times a power of ten."""
        if not self.counts:
            return []
        low, high = min(self.counts), max(self.counts)
        width = next(
            width for width in (step * 10**power for power in range(20) for step in (1, 2, 5))
            if high // width - low // width < at_most
        )  # fmt: skip
        sums: Counter[int] = Counter()
        for value, count in self.counts.items():
            sums[value // width] += count
        return [(key * width, key * width + width - 1, sums[key]) for key in range(low // width, high // width + 1)]


@dataclass(slots=True)
class ErrorKind:
    """The rows with one error code."""

    code: str
    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)  # src_path, src_row, message


@dataclass(slots=True)
class Profile:
    """The numbers of all committed rows."""

    status: JobStatus
    manifest: Manifest
    input_tokens: Histogram = field(default_factory=Histogram)  # of answered rows
    generated_tokens: Histogram = field(default_factory=Histogram)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] | None = field(default_factory=Counter)  # None: more than MAX_ANSWERS
    correct: tuple[int, int] | None = None  # (right, labelled)
    errors: list[ErrorKind] = field(default_factory=list)  # most frequent first
    commits: list[tuple[float, int, int]] = field(default_factory=list)  # (time, rows, tokens computed and generated)
    runs: list[tuple[float, float]] = field(default_factory=list)  # (begin, end so far) of each run on the folder
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds_at_work(self) -> float:
        """The sum over all runs. Runs at the same time count each."""
        return sum(end - begin for begin, end in self.runs)


def profile_of(output: str, num_samples: int) -> Profile:
    """Raises ForeignOutput if this is not an output folder or has no plan yet; ForeignShard; OutputStorageError."""
    manifest, store = manifest_of(output), open_store(output)
    if manifest.task == "finetune":
        raise ForeignOutput(
            f"{output} is of a training, for which there is no report: see its loss.png and metrics.jsonl"
        )
    found = Profile(status_of(output), manifest, runs=times_at_work(store))
    kinds: dict[str, ErrorKind] = {}
    for table in read_columns(output, lambda schema: COLUMNS):
        _count(found, table)
        _collect_errors(kinds, table)
    found.errors = sorted(kinds.values(), key=lambda kind: (-kind.count, kind.code))
    found.commits = sorted(
        (footer.finished, footer.num_rows, footer.num_computed_tokens + footer.num_generated_tokens)
        for footer in committed_footers(store, manifest)
        if footer.finished
    )
    found.samples = sample_rows(output, num_samples, SAMPLE_SEED) if num_samples else []
    return found


def _count(found: Profile, table: pa.Table) -> None:
    answered = table.filter(table["error"].is_null())

    def values(name: str) -> list[Any]:
        return answered[name].drop_null().to_pylist() if name in answered.column_names else []

    found.input_tokens.counts.update(values("num_input_tokens"))
    found.generated_tokens.counts.update(values("num_generated_tokens"))
    found.finish_reasons.update(values("finish_reason"))
    texts, choices = map(str.strip, values("generated_text")), map(str, values("choice"))
    if found.answers is not None:
        found.answers.update(text if len(text) <= MAX_ANSWER_CHARS else text[:MAX_ANSWER_CHARS] + "…" for text in texts)
        found.answers.update(choices)
        if len(found.answers) > MAX_ANSWERS:
            found.answers = None
    if labelled := values("correct"):
        right, num = found.correct or (0, 0)
        found.correct = right + sum(labelled), num + len(labelled)


def _collect_errors(kinds: dict[str, ErrorKind], table: pa.Table) -> None:
    failed = table.filter(table["error"].is_valid()).select(["src_path", "src_row", "error"])
    for row in failed.to_pylist():
        kind = kinds.setdefault(row["error"]["code"], ErrorKind(row["error"]["code"]))
        kind.count += 1
        if len(kind.examples) < EXAMPLES:
            kind.examples.append({**row, "message": row["error"]["message"]})
