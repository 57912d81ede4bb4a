"""Checkpoints of a training: adapters, optimizer and progress in a folder each, written whole or not at all.

Safetensors and JSON only, so that reading one runs nothing. Knows files on a local file system; no model.
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
    """How far a training is, apart from its weights."""

    step: int = 0  # steps done
    num_tokens: int = 0  # fed in all steps
    seconds: float = 0.0  # of training, those before a resume included
    last_loss: float | None = None  # on the held-out examples, when they were last looked at
    best_loss: float | None = None
    best_step: int | None = None
    looks_since_best: int = 0
    is_stopped: bool = False  # early


@dataclass(frozen=True)
class TrainingState:
    """What a training goes on from."""

    progress: Progress
    adapter: dict[str, Tensor]  # by parameter name
    optimizer: dict[str, Tensor] = field(default_factory=dict)


class Checkpoints:
    """The folder that holds them."""

    def __init__(self, root: Path, *, keep: int = 2) -> None:
        self._root = root
        self._keep = keep

    def save(self, state: TrainingState) -> None:
        """Publish one under its step; older ones than the last few are removed."""
        self._write(_STEP, state, self._keep)

    def save_best(self, progress: Progress, adapter: Mapping[str, Tensor]) -> None:
        """The adapter with the best held-out loss so far; the one before is removed."""
        self._write(_BEST, TrainingState(progress, dict(adapter)), 1)

    def latest(self) -> TrainingState | None:
        """The one with the most steps, None if there is none."""
        found = self._folders(_STEP)
        return _read(found[-1]) if found else None

    def best(self, step: int) -> dict[str, Tensor]:
        """The adapter that was the best after this step."""
        return _read(self._root / _name(_BEST, step)).adapter

    def _folders(self, prefix: str) -> list[Path]:
        return sorted(self._root.glob(f"{prefix}*"))

    def _write(self, prefix: str, state: TrainingState, keep: int) -> None:
        """One that is there already is of the same training: it stays as it is, and is never half of something."""
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
