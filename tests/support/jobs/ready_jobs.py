"""Ready jobs for tests, by way of one child for a whole test process: starting another takes longer than most tests."""

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from segue.pipeline.jobfile.read import read_job
from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.problems import JobRefused
from segue.pipeline.processes.limited import LimitedProcess
from segue.pipeline.ready import job
from segue.pipeline.ready.child import checking_child
from segue.pipeline.ready.job import ReadyJob

PLACES = ("AWS_", "FSSPEC_", "HF_", "SEGUE_")  # beginnings of names in the environment that a child must share


def ready_job(path: str | Path, *overrides: str, child: LimitedProcess | None = None, **options: Any) -> ReadyJob:
    """The product's `ready_job`, which checks in the shared child unless it is given another. Raises JobRefused."""
    return job.ready_job(path, overrides, child=child or shared_child(), **options)


def config_of(path: str | Path, *overrides: str) -> JobConfig:
    """What a job file says. Raises JobRefused with every problem of the file."""
    draft = read_job(path, overrides)
    if draft.config is None:
        raise draft.refused()
    return draft.config


def refusals(path: str | Path, *overrides: str, **options: Any) -> list[str]:
    """What a job is refused for, a line each, without the places in its file."""
    with pytest.raises(JobRefused) as refused:
        ready_job(path, *overrides, **options)
    lines = [str(replace(problem, where="")) for problem in refused.value.problems]
    assert len(str(refused.value).splitlines()) == len(lines), "a problem takes more than one line"
    return lines


def refusal(path: str | Path, *overrides: str, **options: Any) -> str:
    """The only problem of a job."""
    (line,) = refusals(path, *overrides, **options)
    return line


def shared_child() -> LimitedProcess:
    """Another one where the environment is another."""
    return _child_in(tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(PLACES))))


@functools.lru_cache(maxsize=1)
def _child_in(environment: tuple[tuple[str, str], ...]) -> LimitedProcess:
    return checking_child()
