"""One process of a training, from a persisted plan to an adapter: alone, or with others in a group.

What it leaves in the output folder: metrics as it goes, checkpoints, at the end the adapter and `_SUCCESS`. Knows
units and files; no Ray, so that it runs in whatever starts it.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.manifest import SUCCESS, Manifest, load_manifest
from pipeline.store import Store
from pipeline.training_data import Holdout, TrainingData, load_training_data
from workers.adapter_record import AdapterRecord
from workers.checkpoints import Checkpoints
from workers.model import DTYPES
from workers.ranks import Ranks
from workers.train import EvaluationReport, StepReport, Trainer
from workers.training_model import TrainingModel
from workers.training_params import LoraParams, TrainingParams

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"


class NothingToTrain(ValueError):
    """The plan has no row to train on, or fewer than the training needs; the message says what there is."""


@dataclass(frozen=True)
class TrainingSpec:
    """What a process must know; the same for all of a group."""

    output: str
    source: str
    revision: str | None
    dtype: str
    lora: LoraParams
    training: TrainingParams
    holdout: Holdout
    seed: int
    answer_end_id: int
    record: AdapterRecord
    threads: int | None


def train_process(spec: TrainingSpec, ranks: Ranks, should_stop: Callable[[], bool] = lambda: False) -> bool:
    """Train to the end, going on from the latest checkpoint; False if `should_stop` said so before.

    Raises NothingToTrain, TrainingDiverged, ModelRefused, OutputStorageError.
    """
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    store = Store(spec.output)
    data = _data(store, spec)
    model = TrainingModel.from_pretrained(
        spec.source, spec.lora, dtype=DTYPES[spec.dtype], revision=spec.revision, seed=spec.seed
    )
    model.check_end(spec.answer_end_id)
    trainer = Trainer(model, data.examples, data.held_out, spec.training, seed=spec.seed, ranks=ranks)
    _check_steps(trainer.num_steps, spec.training)
    checkpoints = Checkpoints(store.root / CHECKPOINTS)
    done = trainer.resume(checkpoints)
    with Metrics(store.root / METRICS, done if ranks.is_first else None) as metrics:
        if not trainer.run(checkpoints, metrics.write, should_stop):
            return False
    eval_loss, _ = trainer.evaluate() if data.held_out else (None, 0)
    if ranks.is_first:
        save_adapter(model, store.root / ADAPTER, spec)
        store.create(SUCCESS, json.dumps(_result(trainer, data, eval_loss), indent=1).encode())
    return True


def save_adapter(model: TrainingModel, target: Path, spec: TrainingSpec) -> None:
    """PEFT's files and the record beside them, all at once."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_adapter(temporary, base_model=spec.source)
    spec.record.save(temporary)
    if target.exists():
        shutil.rmtree(target)
    os.rename(temporary, target)


class Metrics:
    """One JSON line for each step and each look at the held-out examples. `step`: what a resumed training has done;
    later lines are of steps that will be made again. None: a process that writes nothing."""

    def __init__(self, path: Path, step: int | None) -> None:
        self._path = path
        self._step = step
        self._file: Any = None

    def __enter__(self) -> "Metrics":
        if self._step is None:
            return self
        kept = [line for line in read_metrics(self._path) if line["step"] <= self._step]
        temporary = self._path.with_name(f".tmp-{self._path.name}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self._path)
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, event: StepReport | EvaluationReport) -> None:
        if self._file is not None:
            self._file.write(json.dumps(asdict(event)) + "\n")
            self._file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole; a process that was killed may have left a part of one."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def _data(store: Store, spec: TrainingSpec) -> TrainingData:
    manifest = load_manifest(store)
    if not isinstance(manifest, Manifest):
        raise FileNotFoundError(f"{spec.output} has no plan")
    data = load_training_data(store, manifest, spec.holdout, spec.answer_end_id)
    if not data.examples:
        errors = ", ".join(f"{count} {code}" for code, count in sorted(data.errors.items())) or "none"
        raise NothingToTrain(
            f"no row to train on: {len(data.held_out)} are held out, row errors: {errors}; wanted at least one"
        )
    return data


def _check_steps(num_steps: int, params: TrainingParams) -> None:
    if params.warmup_steps >= num_steps:
        raise NothingToTrain(
            f"training.warmup_steps must be fewer than the {num_steps} steps of this training, got "
            f"{params.warmup_steps}: the learning rate would never be reached"
        )


def _result(trainer: Trainer, data: TrainingData, eval_loss: float | None) -> dict[str, Any]:
    progress = trainer.progress
    return {
        "steps": progress.step,
        "num_steps": trainer.num_steps,
        "stopped_early": progress.is_stopped,
        "examples": len(data.examples),
        "held_out": len(data.held_out),
        "errors": dict(sorted(data.errors.items())),
        "eval_loss": eval_loss,
        "best_step": progress.best_step,
        "tokens": progress.num_tokens,
        "training_seconds": round(progress.seconds, 2),
        "tokens_per_second": round(progress.num_tokens / progress.seconds, 1) if progress.seconds else 0.0,
    }
