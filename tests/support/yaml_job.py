"""Writes job files for tests."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML


def write(folder: Path, job: dict[str, Any], name: str = "job.yaml") -> Path:
    """The job as a file in `folder`; its relative paths are relative to there."""
    path = folder / name
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(job, file)
    return path
