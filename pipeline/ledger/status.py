"""How far a job is, from its output folder alone: without the job file, a cluster, or a process of the job.

Knows what runs and trainings leave in the folder; no Ray.
"""

from dataclasses import dataclass, field

from segue.pipeline.ledger.manifest import SUCCESS, Manifest, load_manifest
from segue.pipeline.ledger.presence import RunNote, runs_at_work
from segue.pipeline.ledger.reading import manifest_of
from segue.pipeline.ledger.totals import totals_of
from segue.pipeline.ledger.training_metrics import read_metrics
from segue.pipeline.storage.open import open_store
from segue.pipeline.storage.store import Store


@dataclass(slots=True)
class JobStatus:
    """What an output folder holds now."""

    output: str
    name: str
    task: str
    status: str  # done | running | planning (its first plan is being made) | stopped (not done, and no run at work)
    rows: int = 0  # planned
    rows_done: int = 0
    units: int = 0
    units_done: int = 0
    is_planned: bool = True  # False while windows of the dataset are still to be planned
    errors: dict[str, int] = field(default_factory=dict)  # rows by error code
    tokens_requested: int = 0
    tokens_computed: int = 0
    tokens_generated: int = 0
    runs: list[dict[str, object]] = field(default_factory=list)  # at work now: host, pid, started
    training: dict[str, object] | None = None  # the last step and the last evaluation of a training

    @property
    def share_done(self) -> float:
        """Of the planned rows; of the steps, in a training."""
        if self.training is not None:
            step, total = self.training.get("step", 0), self.training.get("num_steps", 0)
            return float(step) / float(total) if total else 0.0  # type: ignore[arg-type]
        return self.rows_done / self.rows if self.rows else float(self.status == "done")


def status_of(output: str) -> JobStatus:
    """Raises ForeignOutput if it is not an output folder of Segue, ForeignShard, OutputStorageError."""
    store = open_store(output)
    notes = list(runs_at_work(store).values())
    if notes and load_manifest(store) is None:
        return JobStatus(output, name="", task="", status="planning", is_planned=False, runs=_shown(notes))
    manifest = manifest_of(output)
    found = JobStatus(output, manifest.name, manifest.task, _word(store, bool(notes)))
    found.rows, found.units, found.is_planned = manifest.num_rows, len(manifest.units), manifest.is_complete
    found.tokens_requested = int(manifest.stats.get("tokens_requested", 0))
    found.runs = _shown(notes)
    if found.task == "finetune":
        found.training = _training(store)
    else:
        _count(found, store, manifest)
    return found


def _shown(notes: list[RunNote]) -> list[dict[str, object]]:
    return [{"host": note.host, "pid": note.pid, "started": note.started} for note in notes]


def _word(store: Store, is_at_work: bool) -> str:
    if store.exists(SUCCESS):
        return "done"
    return "running" if is_at_work else "stopped"


def _count(found: JobStatus, store: Store, manifest: Manifest) -> None:
    totals = totals_of(store, manifest)
    found.units_done, found.rows_done, found.errors = totals.shards, totals.rows, totals.errors
    found.tokens_computed = totals.num_computed_tokens
    found.tokens_generated = totals.num_generated_tokens


def _training(store: Store) -> dict[str, object]:
    last: dict[str, object] = {}
    for line in read_metrics(store):
        last |= line
    return {name: last[name] for name in ("step", "num_steps", "loss", "eval_loss", "seconds_left") if name in last}
