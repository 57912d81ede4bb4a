"""How far a job is, from its output folder alone: no job file, no cluster, no process of it need be there any more.

Knows what runs and trainings leave; no Ray.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from segue.pipeline.dataset.listing import is_local
from segue.pipeline.ledger.manifest import SUCCESS, Manifest, load_manifest
from segue.pipeline.ledger.presence import RunNote, runs_at_work
from segue.pipeline.ledger.reading import manifest_of
from segue.pipeline.ledger.totals import committed_footers, count_rows
from segue.pipeline.storage.store import Store, open_store
from segue.pipeline.train.metrics import METRICS, read_metrics

TRAINING = "finetune"  # the task of a plan that is trained on


@dataclass(slots=True)
class JobStatus:
    """Of an output folder now."""

    output: str
    name: str
    task: str
    status: str  # done | running | planning: its first plan is being made | stopped: not done, and nobody is at work
    rows: int = 0  # planned
    rows_done: int = 0
    units: int = 0
    units_done: int = 0
    is_planned: bool = True  # False while windows of the dataset are still to be planned
    errors: dict[str, int] = field(default_factory=dict)  # rows by code
    tokens_requested: int = 0
    tokens_computed: int = 0
    tokens_generated: int = 0
    runs: list[dict[str, object]] = field(default_factory=list)  # at work: host, pid, started
    training: dict[str, object] | None = None  # the last step and the last look at held-out examples

    @property
    def share_done(self) -> float:
        """Of planned rows; of steps, in a training."""
        if self.training is not None:
            step, total = self.training.get("step", 0), self.training.get("num_steps", 0)
            return float(step) / float(total) if total else 0.0  # type: ignore[arg-type]
        return self.rows_done / self.rows if self.rows else float(self.status == "done")


def status_of(output: str) -> JobStatus:
    """Raises ForeignOutput for what is no output folder, ForeignShard, OutputStorageError."""
    store = open_store(output)
    notes = list(runs_at_work(store).values())
    if notes and load_manifest(store) is None:
        return JobStatus(output, name="", task="", status="planning", is_planned=False, runs=_told(notes))
    manifest = manifest_of(output)
    found = JobStatus(output, manifest.name, str(manifest.fields.get("task", "generate")), _word(store, bool(notes)))
    found.rows, found.units, found.is_planned = manifest.num_rows, len(manifest.units), manifest.is_complete
    found.tokens_requested = int(manifest.stats.get("tokens_requested", 0))
    found.runs = _told(notes)
    if found.task == TRAINING:
        found.training = _training(output)
    else:
        _count(found, store, manifest)
    return found


def _told(notes: list[RunNote]) -> list[dict[str, object]]:
    return [{"host": note.host, "pid": note.pid, "started": note.started} for note in notes]


def _word(store: Store, is_at_work: bool) -> str:
    if store.exists(SUCCESS):
        return "done"
    return "running" if is_at_work else "stopped"


def _count(found: JobStatus, store: Store, manifest: Manifest) -> None:
    footers = committed_footers(store, manifest)
    errors: Counter[str] = Counter()
    for footer in footers:
        errors.update(footer.errors)
    found.units_done, found.errors = len(footers), dict(sorted(errors.items()))
    found.rows_done, _ = count_rows(footers)
    found.tokens_computed = sum(footer.num_computed_tokens for footer in footers)
    found.tokens_generated = sum(footer.num_generated_tokens for footer in footers)


def _training(output: str) -> dict[str, object]:
    lines = read_metrics(Path(output) / METRICS) if is_local(output) else []
    last: dict[str, object] = {}
    for line in lines:
        last |= line
    return {name: last[name] for name in ("step", "num_steps", "loss", "eval_loss", "seconds_left") if name in last}
