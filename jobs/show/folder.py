"""An output folder in a few lines for people: the summary of a run, how far a job is, and what is damaged."""

import shlex

from rich.console import Console

from segue.jobs.show.lines import console, plain
from segue.pipeline.ledger.status import JobStatus
from segue.pipeline.ledger.totals import RunSummary
from segue.pipeline.ledger.verify import Verification


def show_summary(summary: RunSummary) -> None:
    """Print a run in a few lines."""
    out = console()
    errors = ", ".join(f"{count} {code}" for code, count in summary.errors.items()) or "none"
    out.print(
        f"{summary.status.replace('_', ' ')}: {summary.rows:,} rows in {summary.shards} shards "
        f"in {plain(summary.output)}"
    )
    out.print(f"row errors: {errors}")
    if summary.reason:
        planned = ", ".join(f"{count} {code}" for code, count in summary.errors_planned.items()) or "none"
        out.print(f"stopped: {summary.reason} (errors in the plan: {planned})", soft_wrap=True)
    out.print(
        f"prompt tokens: {summary.tokens_requested:,} requested, {summary.tokens_distinct:,} distinct, "
        f"{summary.tokens_computed:,} computed ({summary.share_reused:.1%} reused); "
        f"{summary.tokens_generated:,} generated"
    )
    if summary.rows_this_run:
        out.print(
            f"this run: {summary.rows_this_run:,} rows in {summary.seconds:.1f} s, {summary.rows_per_second:.1f} rows/s"
        )
    if told := _next_of(summary):
        out.print(f"next: {told}")


def _next_of(summary: RunSummary) -> str:
    """The commands that help now, or nothing if the job is complete and has no errors."""
    output = plain(shlex.quote(summary.output))
    steps = []
    if summary.num_errors or summary.errors_planned:
        steps.append(f"segue errors {output}")
    if summary.status == "too_many_errors":
        steps.append("with a higher limits.max_error_rate the same command goes on where this one stopped")
    elif summary.status not in ("done", "already_complete"):
        steps.append("the same command goes on where this one stopped")
    elif summary.num_errors:
        steps.append(f"segue retry {output} --output OTHER --set KEY=VALUE answers these rows again")
    return "; ".join(steps)


def show_status(found: JobStatus) -> None:
    """Print how far the job is, which processes work on it, and how to go on."""
    out = console()
    if found.status == "planning":
        out.print(f"planning: nothing is in {plain(found.output)} yet")
    else:
        _show_progress(out, found)
    for run in found.runs:
        out.print(f"at work: process {plain(str(run['pid']))} on {plain(str(run['host']))}")
    if found.status == "stopped":
        command = "finetune" if found.training is not None else "run"
        out.print(f"nobody is at work on it: the same `segue {command} JOB.yaml` goes on where it stopped")


def _show_progress(out: Console, found: JobStatus) -> None:
    out.print(f"{plain(found.name)}: {found.status}, {found.share_done:.1%}, in {plain(found.output)}")
    if found.training is not None:
        told = ", ".join(f"{name} {value}" for name, value in found.training.items())
        out.print(f"training: {plain(told) or 'no step yet'}")
    else:
        more = "" if found.is_planned else "; more of the input is still to be planned"
        out.print(f"{found.rows_done:,} of {found.rows:,} rows in {found.units_done:,} of {found.units:,} shards{more}")
        out.print(f"row errors: {', '.join(f'{n} {code}' for code, n in found.errors.items()) or 'none'}")
        out.print(f"tokens: {found.tokens_computed:,} computed, {found.tokens_generated:,} generated")


def show_verification(found: Verification) -> None:
    """Print each damaged file, and how much is sound."""
    out = console()
    for damage in found.damages:
        out.print(f"{damage.kind}: {plain(damage.path)}: {plain(damage.detail)}", soft_wrap=True)
    missing = f", {found.missing} still to come" if found.missing else ""
    out.print(f"{found.status}: {found.rows:,} rows in {found.shards} shards in order{missing}")
