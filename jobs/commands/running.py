"""A job that is run by a command: one that a person has written, or one that the command has made up."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from segue.jobs.commands.ending import say, silent

if TYPE_CHECKING:
    from segue.pipeline.jobfile.read import JobDraft
    from segue.pipeline.ledger.totals import RunSummary
    from segue.pipeline.ready.job import ReadyJob


def run_file(path: str, overrides: Sequence[str], *, quiet: bool) -> tuple["ReadyJob", "RunSummary"]:
    """Prepare and run a job file. Raises what preparing and running raise."""
    from segue.pipeline.jobfile.read import read_job

    return _run(read_job(path, overrides), quiet=quiet)


def run_values(values: Mapping[str, Any], overrides: Sequence[str], *, quiet: bool, json_only: bool) -> "RunSummary":
    """Run the job with these values as its file. Raises what preparing and running raise."""
    from segue.pipeline.jobfile.read import read_job
    from segue.pipeline.jobfile.yaml_text import as_yaml

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{values['name']}.yaml")
        with open(path, "w", encoding="utf-8") as file:
            file.write(as_yaml(values))
        draft = read_job(path, overrides)
    _, summary = _run(draft, quiet=quiet)
    if not json_only:
        from segue.jobs.show.folder import show_summary

        show_summary(summary)
    return summary


def _run(draft: "JobDraft", *, quiet: bool) -> tuple["ReadyJob", "RunSummary"]:
    """What takes seconds each goes on at once: the child's imports, this process's own, and Ray's start."""
    from segue.pipeline.ready.child import checking_process

    if draft.config:
        checking_process(draft.config).begin()
    from segue.pipeline.processes.ray_session import is_local
    from segue.pipeline.ready.job import prepared
    from segue.pipeline.run.run import ray_ahead, run_job

    with ray_ahead() as start_ray:
        ready = prepared(draft, runs_here=is_local(), meanwhile=start_ray)
        if ready.warns_of_unadapted_mask:
            say("warning: mask segment on a model that was not adapted to it: expect worse answers, often garbage")
        return ready, run_job(ready, silent if quiet else say, quiet=quiet)
