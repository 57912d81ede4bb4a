"""The smallest job file, with changes: what is read of it, and what it is refused for."""

from pathlib import Path

import pytest
from ready_jobs import config_of

from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.problems import JobRefused

MINIMAL = """\
name: triage
model: {source: echo}
input: {path: tickets}
output: {path: out}
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "job.yaml"
    file.write_text(text)
    return file


def load(folder: Path, text: str, *overrides: str) -> JobConfig:
    return config_of(write(folder, text), *overrides)


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
