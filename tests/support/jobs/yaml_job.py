"""Writes job files for tests, and the smallest one with changes: what is read of it, what it is refused for."""

from pathlib import Path
from typing import Any

import pytest
from ready_jobs import config_of
from ruamel.yaml import YAML

from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.problems import JobRefused

MINIMAL = """\
name: triage
model: {source: echo}
input: {path: tickets}
output: {path: out}
"""


def write(folder: Path, job: dict[str, Any], name: str = "job.yaml") -> Path:
    """The job as a file in `folder`; its relative paths are relative to there."""
    path = folder / name
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(job, file)
    return path


def write_text(folder: Path, text: str) -> Path:
    file = folder / "job.yaml"
    file.write_text(text)
    return file


def load(folder: Path, text: str, *overrides: str) -> JobConfig:
    return config_of(write_text(folder, text), *overrides)


def refusals(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(JobRefused) as refused:
        load(folder, text, *overrides)
    lines = str(refused.value).splitlines()
    assert len(lines) == len(refused.value.problems), "a problem takes more than one line"
    return lines


def refusal(folder: Path, text: str, *overrides: str) -> str:
    lines = refusals(folder, text, *overrides)
    assert len(lines) == 1, lines
    return lines[0]
