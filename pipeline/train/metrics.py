"""The file in which a training writes what it has done, line by line, for who looks on or after."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segue.workers.training.trainer import EvaluationReport, StepReport

METRICS = "metrics.jsonl"


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

    def write(self, event: "StepReport | EvaluationReport") -> None:
        if self._file is not None:
            self._file.write(json.dumps(asdict(event)) + "\n")
            self._file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole; a process that was killed may have left a part of one."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]
