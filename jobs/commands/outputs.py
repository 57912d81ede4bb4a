"""The commands that look at an output folder, finished or not: errors, status, report, verify, evaluate.

None of them needs a cluster or the job file.
"""

from dataclasses import asdict
from typing import Annotated

import typer

from segue.jobs.commands.ending import exit_codes, print_json, say
from segue.jobs.commands.options import AsJson, absolute


def errors(
    output: Annotated[str, typer.Argument(metavar="OUT", help="an output folder, finished or not")],
    limit: Annotated[int, typer.Option(help="show at most this many rows")] = 50,
    json_only: AsJson = False,
) -> None:
    """The rows that have an error, and how many of each kind. The README has what the kinds mean."""
    with exit_codes():
        from segue.jobs.show.rows import show_errors
        from segue.pipeline.ledger.reading import error_counts, error_rows

        counts = error_counts(output)
        if not json_only:
            show_errors(error_rows(output, limit), sum(counts.values()))
        print_json({"output": output, "errors": counts})


def status(
    output: Annotated[str, typer.Argument(metavar="OUT", help="an output folder, finished or not")],
    json_only: AsJson = False,
) -> None:
    """How far a job is, from its output folder alone: the cluster may be gone, and the job file too."""
    with exit_codes():
        from segue.jobs.show.folder import show_status
        from segue.pipeline.ledger.status import status_of

        found = status_of(output)
        if not json_only:
            show_status(found)
        print_json(asdict(found) | {"share_done": round(found.share_done, 4)})


def report(
    output: Annotated[str, typer.Argument(metavar="OUT", help="an output folder, finished or not")],
    page: Annotated[str, typer.Option("--html", metavar="FILE", help="the page to write")] = "report.html",
    samples: Annotated[int, typer.Option(help="rows to show, drawn by lot; 0 keeps texts of rows out", min=0)] = 8,
    hourly_price: Annotated[
        float | None, typer.Option(help="of one worker: its GPUs, or its share of a machine")
    ] = None,
) -> None:
    """One HTML page of what a job did: rows, errors, tokens, what rows share, throughput, answers, samples, cost."""
    with exit_codes():
        from segue.jobs.analysis.profile import profile_of
        from segue.jobs.show.report import write_report
        from segue.pipeline.problems import JobRefused, Problem

        found = profile_of(output, samples)
        try:
            write_report(found, page, hourly_price)
        except OSError as error:
            got = error.strerror or str(error)
            raise JobRefused([Problem("--html", got, "a file that can be written", where=page)]) from None
        say(f"{page}: {found.status.rows_done:,} of {found.status.rows:,} rows, {found.status.status}")
        print_json({"report": absolute(page), "output": output, "rows": found.status.rows_done})


def verify(
    output: Annotated[str, typer.Argument(metavar="OUT", help="an output folder, finished or not")],
    json_only: AsJson = False,
) -> None:
    """Whether a folder still holds what its job wrote, byte by byte: missing, cut, changed and foreign files by name.

    Exit codes: 0 sound, 3 not complete yet, 5 damaged.
    """
    with exit_codes():
        from segue.jobs.show.folder import show_verification
        from segue.pipeline.ledger.verify import verify as verified

        found = verified(output)
        if not json_only:
            show_verification(found)
        print_json(asdict(found))
    raise typer.Exit(found.exit_code)


def evaluate(
    output: Annotated[str, typer.Argument(metavar="OUT", help="a finished output folder")],
    other: Annotated[str | None, typer.Argument(metavar="[OUT2]", help="another, to compare row by row")] = None,
    by: Annotated[str | None, typer.Option(help="group rows by this column; `task`, if they have it")] = None,
    label: Annotated[str | None, typer.Option(help="of generated answers: the column with the right ones")] = None,
    regex: Annotated[str | None, typer.Option(help="of generated answers: what in the text is the answer")] = None,
    preset: Annotated[str | None, typer.Option(help="label and regex of a known format: commonsense")] = None,
    ignore_case: Annotated[bool, typer.Option(help="of generated answers: case does not matter")] = False,
    json_only: AsJson = False,
) -> None:
    """How often finished outputs are right, with 95% intervals; two of them compared."""
    with exit_codes():
        from segue.jobs.analysis.evaluate import compare, evaluation_json
        from segue.jobs.analysis.evaluate import evaluate as evaluated
        from segue.jobs.analysis.judge import judging_of
        from segue.jobs.show.evaluation import show_evaluation, show_pairings

        judging = judging_of(by=by, label=label, regex=regex, preset=preset, ignore_case=ignore_case)
        found, rows = evaluated(output, judging)
        second, second_rows = evaluated(other, judging) if other is not None else (None, None)
        pairings = compare(rows, second_rows) if second_rows is not None else []
        if not json_only:
            for each in filter(None, (found, second)):
                show_evaluation(each)
            show_pairings(pairings)
        result = evaluation_json(found)
        if second is not None:
            result |= {"other": evaluation_json(second), "paired": [asdict(pairing) for pairing in pairings]}
        print_json(result)
