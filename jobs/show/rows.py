"""Rows of an output, printed for people: a sample with its answers, and rows with errors."""

from collections.abc import Sequence
from typing import Any

from segue.jobs.show.lines import console, plain
from segue.pipeline.ledger.columns import RESULT_COLUMNS
from segue.pipeline.ledger.reading import sample_rows, task_of
from segue.workers.scoring.template import Task

SAMPLE_SEED = 0


def show_answers(output: str, count: int) -> None:
    """Print a fixed sample of `count` rows with their answers."""
    if count <= 0:
        return
    out, task = console(), task_of(output)
    for row in sample_rows(output, count, SAMPLE_SEED):
        out.print(f"[bold]{plain(row['src_path'])}:{row['src_row']}[/bold]")
        for name, value in row.items():
            if name not in RESULT_COLUMNS[task] and isinstance(value, str):
                out.print(f"  {plain(name)}: {plain(value)}")
        out.print(f"  -> {plain(_answer(row, task))}\n")


def _answer(row: dict[str, Any], task: Task) -> str:
    """A row's result as text."""
    if row["error"] is not None:
        return f"{row['error']['code']}: {row['error']['message']}"
    if task == "generate":
        return row["generated_text"]
    if task == "choose":
        verdict = {True: ", right", False: ", wrong", None: ""}[row["correct"]]
        logprobs = ", ".join(f"{logprob:.2f}" for logprob in row["choice_logprobs"])
        return f"choice {row['choice']}{verdict} (log-probabilities {logprobs})"
    return f"log-probability {row['logprob']:.2f} over {row['num_tokens']:,} tokens"


def show_errors(rows: Sequence[dict[str, Any]], total: int) -> None:
    """Print one line for each row; `total` is the number of rows with an error, shown or not."""
    out = console()
    for row in rows:
        out.print(f"{plain(row['src_path'])}:{row['src_row']} {row['code']}: {plain(row['message'])}")
    if total > len(rows):
        out.print(f"... and {total - len(rows):,} more")
    if not total:
        out.print("no row has an error")
