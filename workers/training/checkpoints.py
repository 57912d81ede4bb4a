"""Checkpoints of a training: each is a folder with adapters, optimizer and progress, written whole or not at all.

Safetensors and JSON only, so that reading a checkpoint runs no code. Knows files on a local file system; no model.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

_STEP, _BEST = "step-", "best-"
_TEMPORARY = ".tmp-"


@dataclass(slots=True)
class Progress:
    """How far a training is; its weights are apart."""

    step: int = 0  # steps done
    num_tokens: int = 0  # fed in all steps
    seconds: float = 0.0  # of training, with those before a resume
    last_loss: float | None = None  # on the held-out examples, at the last evaluation
    best_loss: float | None = None
    best_step: int | None = None
    looks_since_best: int = 0  # evaluations
    is_stopped: bool = False  # early, since the loss no longer fell


@dataclass(frozen=True)
class TrainingState:
    """What a resumed training needs."""

    progress: Progress
    adapter: dict[str, Tensor]  # by parameter name
    optimizer: dict[str, Tensor] = field(default_factory=dict)


class Checkpoints:
    """The folder of a training's checkpoints. `keep` is how many it keeps, besides the best adapter."""

    def __init__(self, root: Path, *, keep: int = 2) -> None:
        self._root = root
        self._keep = keep

    def save(self, state: TrainingState) -> None:
        """Publish one under its step. All but the latest few are removed."""
        self._write(_STEP, state, self._keep)

    def save_best(self, progress: Progress, adapter: Mapping[str, Tensor]) -> None:
        """Publish the adapter with the best held-out loss so far. The one before is removed."""
        self._write(_BEST, TrainingState(progress, dict(adapter)), 1)

    def latest(self) -> TrainingState | None:
        """The checkpoint with the most steps; None if there is none."""
        found = self._folders(_STEP)
        return _read(found[-1]) if found else None

    def best(self, step: int) -> dict[str, Tensor]:
        """The adapter that was the best after this step."""
        return _read(self._root / _name(_BEST, step)).adapter

    def _folders(self, prefix: str) -> list[Path]:
        return sorted(self._root.glob(f"{prefix}*"))

    def _write(self, prefix: str, state: TrainingState, keep: int) -> None:
        """A checkpoint of this step that is there already is of the same training, and complete. It stays as it is."""
        name = _name(prefix, state.progress.step)
        temporary, target = self._root / f"{_TEMPORARY}{name}", self._root / name
        if not target.exists():
            self._publish(state, temporary, target)
        for folder in self._folders(prefix)[:-keep]:
            shutil.rmtree(folder)

    def _publish(self, state: TrainingState, temporary: Path, target: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _save_tensors(state.adapter, temporary / "adapter.safetensors")
        _save_tensors(state.optimizer, temporary / "optimizer.safetensors")
        (temporary / "progress.json").write_text(json.dumps(asdict(state.progress), indent=1), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        os.rename(temporary, target)
        sync(self._root)


def _name(prefix: str, step: int) -> str:
    return f"{prefix}{step:08d}"


def _read(folder: Path) -> TrainingState:
    progress: dict[str, Any] = json.loads((folder / "progress.json").read_bytes())
    tensors = [load_file(folder / f"{name}.safetensors") for name in ("adapter", "optimizer")]
    return TrainingState(Progress(**progress), *tensors)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def sync(path: Path) -> None:
    """Make a file or a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
