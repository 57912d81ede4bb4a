"""A job that a command has made up, run and shown like one that a person has written."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.ending import say, silent

if TYPE_CHECKING:
    from pipeline.summary import RunSummary


def run_values(values: Mapping[str, Any], overrides: Sequence[str], *, quiet: bool, json_only: bool) -> "RunSummary":
    """Run the job with these values as its file. Raises what preparing and running raise."""
    from jobs.show import show_summary
    from pipeline.cluster import is_local
    from pipeline.job import prepare
    from pipeline.run import run_job
    from pipeline.yaml_file import as_yaml

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{values['name']}.yaml")
        with open(path, "w", encoding="utf-8") as file:
            file.write(as_yaml(values))
        ready = prepare(path, overrides, runs_here=is_local())
    summary = run_job(ready, silent if quiet else say, quiet=quiet)
    if not json_only:
        show_summary(summary)
    return summary
