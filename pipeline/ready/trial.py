"""A few rows rendered before anything starts: a prompt that fits none of them is refused in a second, not after an hour
of planning.

Single rows that cannot be rendered do not matter here: in the run each gets an error of its own. Knows how rows are
read and rendered; nothing of Ray.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from segue.pipeline.dataset.blocks import PageCorrupt, read_blocks
from segue.pipeline.dataset.files import InputFile, RowNumbers
from segue.pipeline.jobfile.schema import MIN_ROWS_FOR_ERROR_RATE
from segue.pipeline.problems import JobRefused, Problem
from segue.pipeline.processes.limited import ChildDied, LimitedProcess
from segue.pipeline.prompts.render import RenderSpec, render_block
from segue.pipeline.ready.checks import CheckedJob

SECONDS = 5.0  # of CPU time, from one row to the next
NUM_FILES, ROWS_EACH = 4, 16  # their first rows: those behind them in a row group cost as much as all before


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of the rows that were tried."""

    num_rows: int = 0
    errors: tuple[str, ...] = ()  # of those that have one, each with the place of its row


def try_rows(job: CheckedJob, spec: RenderSpec, child: LimitedProcess) -> Trial:
    """Render a few rows of the job in `child`. None are tried if they are examples of a training or rows of a retry, or
    if they end the child: then the plan finds out which of them do.

    Raises JobRefused if every row has an error, in a job so large that `limits.max_error_rate` would stop it;
    InputChanged, InputUnreadable, ChildUnready.
    """
    if job.config.task == "finetune" or job.failed is not None:
        return Trial()
    chosen = [(file, rows[:ROWS_EACH]) for file, rows in zip(job.inputs, job.rows, strict=True) if len(rows)]
    numbers = {round(step * (len(chosen) - 1) / (NUM_FILES - 1)) for step in range(NUM_FILES)}
    chosen = [chosen[number] for number in sorted(numbers)] if chosen else []
    try:
        found = list(child.stream(_errors, chosen, job.columns.schema, spec, seconds=SECONDS))
    except (ChildDied, PageCorrupt):
        return Trial()
    trial = Trial(len(found), tuple(error for error in found if error))
    _check_hopeful(job, trial)
    return trial


def _check_hopeful(job: CheckedJob, trial: Trial) -> None:
    is_hopeless = len(trial.errors) == trial.num_rows > 0
    if is_hopeless and job.num_rows >= MIN_ROWS_FOR_ERROR_RATE and job.config.limits.max_error_rate < 1:
        got = f"an error in each of {trial.num_rows} rows that were tried, the first {trial.errors[0]}"
        hint = "or limits.max_error_rate: 1, to have all the errors"
        raise JobRefused([Problem("prompt", got, "one that fits the rows", hint)])


def _errors(chosen: list[tuple[InputFile, RowNumbers]], columns: pa.Schema, spec: RenderSpec) -> Iterator[str]:
    """In the child. Of each row its error, or ""."""
    for file, rows in chosen:
        start, stop = int(rows[0]), int(rows[-1]) + 1
        for _, block in read_blocks(file, start, stop, columns, rows, ROWS_EACH):
            planned = render_block(block, spec)
            for number, error in zip(planned["src_row"].to_pylist(), planned["error"].to_pylist(), strict=True):
                yield f"{error['code']} in row {number} of {file.src_path}: {error['message']}" if error else ""
