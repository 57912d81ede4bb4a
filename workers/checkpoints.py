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

_PREFIX = "step-"
_TEMPORARY = ".tmp-"


@dataclass(slots=True)
class Progress:
    """How far a training is, apart from its weights."""

    step: int = 0  # steps done
    num_tokens: int = 0  # fed in all steps
    seconds: float = 0.0  # of training, those before a resume included
    best_loss: float | None = None  # on the held-out examples
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
        self._write(f"{_PREFIX}{state.progress.step:08d}", state)
        for folder in self._steps()[: -self._keep]:
            shutil.rmtree(folder)

    def save_best(self, adapter: Mapping[str, Tensor]) -> None:
        """The adapter with the best held-out loss so far."""
        self._write("best", TrainingState(Progress(), dict(adapter)))

    def latest(self) -> TrainingState | None:
        """The one with the most steps, None if there is none."""
        steps = self._steps()
        return _read(steps[-1]) if steps else None

    def best(self) -> dict[str, Tensor] | None:
        """What `save_best` saved last."""
        folder = self._root / "best"
        return _read(folder).adapter if folder.is_dir() else None

    def _steps(self) -> list[Path]:
        return sorted(self._root.glob(f"{_PREFIX}*"))

    def _write(self, name: str, state: TrainingState) -> None:
        temporary, target = self._root / f"{_TEMPORARY}{name}", self._root / name
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _save_tensors(state.adapter, temporary / "adapter.safetensors")
        _save_tensors(state.optimizer, temporary / "optimizer.safetensors")
        (temporary / "progress.json").write_text(json.dumps(asdict(state.progress), indent=1), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
        _sync(self._root)


def _read(folder: Path) -> TrainingState:
    progress: dict[str, Any] = json.loads((folder / "progress.json").read_bytes())
    tensors = [load_file(folder / f"{name}.safetensors") for name in ("adapter", "optimizer")]
    return TrainingState(Progress(**progress), *tensors)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
