"""One process of a training, from the stored plan to an adapter: alone, or as one of a group.

It writes metrics and checkpoints into the output folder, and at the end the adapter and `_SUCCESS`. Knows units and
files; no Ray, so that anything can start it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from segue.pipeline.ledger.manifest import SUCCESS, load_manifest
from segue.pipeline.ledger.totals import is_over_limit
from segue.pipeline.storage.folder import LocalStore
from segue.pipeline.storage.models import local_source
from segue.pipeline.storage.store import OutputStorageError
from segue.pipeline.train.examples import Holdout, TrainingData, load_training_data
from segue.pipeline.train.metrics import MetricsFile
from segue.workers.devices.devices import DTYPES
from segue.workers.devices.memory import keep_freed_memory
from segue.workers.models.adapter_record import RECORD, AdapterRecord
from segue.workers.training.batches import num_steps
from segue.workers.training.checkpoints import Checkpoints, sync
from segue.workers.training.model import TrainingModel
from segue.workers.training.params import LoraParams, TrainingParams
from segue.workers.training.ranks import Ranks
from segue.workers.training.trainer import Trainer

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"


class NothingToTrain(ValueError):
    """The plan has no rows to train on, or too few good ones. The message says what it has."""


@dataclass(frozen=True)
class TrainingSpec:
    """What a process must know. All processes of a group get the same."""

    output: str
    source: str
    revision: str | None
    dtype: str
    lora: LoraParams
    training: TrainingParams
    holdout: Holdout
    max_error_rate: float
    seed: int
    answer_end_id: int
    record: AdapterRecord
    threads: int | None
    device: str = "cpu"


def check_data(spec: TrainingSpec) -> TrainingData:
    """The plan's rows as training data. Raises NothingToTrain if there are too few or too many errors, UnitDamaged."""
    store = LocalStore(spec.output)
    manifest = load_manifest(store)
    if manifest is None:
        raise FileNotFoundError(f"{spec.output} has no plan")
    data = load_training_data(store, manifest, spec.holdout, spec.answer_end_id)
    errors = ", ".join(f"{count} {code}" for code, count in sorted(data.errors.items())) or "none"
    if not data.examples:
        wanted = "wanted at least one"
        raise NothingToTrain(f"no row to train on: {len(data.held_out)} are held out, row errors: {errors}; {wanted}")
    if is_over_limit(manifest.num_rows, data.errors.total(), spec.max_error_rate):
        raise NothingToTrain(f"limits.max_error_rate is {spec.max_error_rate}, got row errors: {errors}")
    _check_steps(num_steps(len(data.examples), spec.training), spec.training)
    if not data.held_out and spec.training.early_stopping_patience is not None:
        raise NothingToTrain("training.early_stopping_patience needs held-out examples, got none (see evaluation)")
    return data


def train_process(
    spec: TrainingSpec,
    ranks: Ranks,
    should_stop: Callable[[], bool] = lambda: False,
    data: TrainingData | None = None,
) -> bool:
    """Train from the latest checkpoint to the end. False if `should_stop` ended it before.

    Raises NothingToTrain, TrainingDiverged, ModelRefused, OutputStorageError.
    """
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    keep_freed_memory()
    store = LocalStore(spec.output)
    data = data or check_data(spec)
    model = TrainingModel.from_pretrained(
        local_source(spec.source),
        spec.lora,
        dtype=DTYPES[spec.dtype],
        revision=spec.revision,
        seed=spec.seed,
        device=spec.device,
    )
    trainer = Trainer(model, data.examples, data.held_out, spec.training, seed=spec.seed, ranks=ranks)
    checkpoints = Checkpoints(store.root / CHECKPOINTS)
    with _storage_errors(store.root):
        done = trainer.resume(checkpoints)
        with MetricsFile(store, done if ranks.is_first else None) as metrics:
            if not trainer.run(checkpoints, metrics.write, should_stop):
                return False
        if ranks.is_first:
            save_adapter(model, store.root / ADAPTER, spec.record)
            store.create(SUCCESS, json.dumps(_result(trainer, data), indent=1).encode())
    return True


def save_adapter(model: TrainingModel, target: Path, record: AdapterRecord) -> None:
    """Write PEFT's files and the record beside them. They are durable, and appear all at once."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_adapter(temporary, base_model=record.base_model or "")
    record.save(temporary)
    for path in temporary.iterdir():
        shutil.copymode(temporary / RECORD, path)  # safetensors writes files that only their owner may read
    for path in [*temporary.iterdir(), temporary]:
        sync(path)
    shutil.rmtree(target, ignore_errors=True)  # left by a run that was killed before it wrote _SUCCESS
    os.rename(temporary, target)
    sync(target.parent)


@contextmanager
def _storage_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OutputStorageError:
        raise
    except OSError as error:
        raise OutputStorageError(f"{error.filename or root}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise OutputStorageError(f"{root / CHECKPOINTS}: {error}") from error


def _check_steps(num_steps: int, params: TrainingParams) -> None:
    if params.warmup_steps >= num_steps:
        raise NothingToTrain(
            f"training.warmup_steps must be fewer than the {num_steps} steps of this training, got "
            f"{params.warmup_steps}: the learning rate would never be reached"
        )


def _result(trainer: Trainer, data: TrainingData) -> dict[str, Any]:
    progress = trainer.progress
    return {
        "steps": progress.step,
        "num_steps": trainer.num_steps,
        "stopped_early": progress.is_stopped,
        "examples": len(data.examples),
        "held_out": len(data.held_out),
        "errors": dict(sorted(data.errors.items())),
        "eval_loss": trainer.kept_loss,
        "best_step": progress.best_step,
        "tokens": progress.num_tokens,
        "training_seconds": round(progress.seconds, 2),
        "tokens_per_second": round(progress.num_tokens / progress.seconds, 1) if progress.seconds else 0.0,
    }
