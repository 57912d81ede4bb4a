"""A job that is run by a command: one that a person has written, or one that the command has made up."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from segue.jobs.commands.ending import say, silent

if TYPE_CHECKING:
    from segue.pipeline.jobfile.schema import JobConfig
    from segue.pipeline.ledger.totals import RunSummary
    from segue.pipeline.ready.job import ReadyJob


def run_file(path: str, overrides: Sequence[str], *, quiet: bool) -> tuple["ReadyJob", "RunSummary"]:
    """Check and run a job file. Raises what `ready_job` and `run_job` raise.

    What takes seconds each goes on at once: the checking child's imports, this process's import of Ray, and Ray's
    start.
    """
    from segue.pipeline.processes.address import is_local
    from segue.pipeline.ready.child import checking_child
    from segue.pipeline.ready.job import ready_job

    with checking_child() as child, ExitStack() as stack:

        def start_ray(config: "JobConfig") -> None:
            from segue.pipeline.run.run import ray_ahead

            stack.enter_context(ray_ahead(config))

        ready = ready_job(path, overrides, child=child, runs_here=is_local(), meanwhile=start_ray)
        if ready.warns_of_unadapted_mask:
            say("warning: mask segment on a model that was not adapted to it: expect worse answers, often garbage")
        from segue.pipeline.run.run import run_job

        return ready, run_job(ready, silent if quiet else say, quiet=quiet, child=child)


def run_values(values: Mapping[str, Any], overrides: Sequence[str], *, quiet: bool, json_only: bool) -> "RunSummary":
    """Run the job with these values as its file. Raises what `ready_job` and `run_job` raise."""
    from segue.pipeline.jobfile.yaml_text import as_yaml

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{values['name']}.yaml")
        with open(path, "w", encoding="utf-8") as file:
            file.write(as_yaml(values))
        _, summary = run_file(path, overrides, quiet=quiet)
    if not json_only:
        from segue.jobs.show.folder import show_summary

        show_summary(summary)
    return summary
