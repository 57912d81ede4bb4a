"""A few rows made ready before anything starts: a prompt that fits none of the data is told of in a second, not after
an hour of planning.

It says nothing of single rows, which cost themselves. Knows how rows are read and rendered; nothing of Ray.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from segue.pipeline.dataset.blocks import PageCorrupt, read_blocks
from segue.pipeline.dataset.files import InputFile, RowNumbers
from segue.pipeline.jobfile.schema import MIN_ROWS_FOR_ERROR_RATE
from segue.pipeline.problems import Problem
from segue.pipeline.processes.limited import ChildDied, LimitedProcess
from segue.pipeline.prompts.render import RenderSpec, render_block
from segue.pipeline.ready.checks import CheckedJob

SECONDS = 5.0  # of CPU time, from one row to the next
NUM_FILES, ROWS_EACH = 4, 16  # their first rows: those behind them in a row group cost as much as all before


@dataclass(frozen=True, slots=True)
class Sample:
    """What became of some rows."""

    num_rows: int = 0
    errors: tuple[str, ...] = ()  # of those that have one, each with the place of its row


def sample_of(job: CheckedJob, spec: RenderSpec, child: LimitedProcess) -> Sample:
    """Rows of the job, rendered in `child`; none of them if they are examples of a training, or to be tried again, or
    if they end the child: then the plan finds out which of them do.

    Raises InputChanged, InputUnreadable, ChildUnready.
    """
    if job.config.task == "finetune" or job.failed is not None:
        return Sample()
    chosen = [(file, rows[:ROWS_EACH]) for file, rows in zip(job.inputs, job.rows, strict=True) if len(rows)]
    numbers = {round(step * (len(chosen) - 1) / (NUM_FILES - 1)) for step in range(NUM_FILES)}
    chosen = [chosen[number] for number in sorted(numbers)] if chosen else []
    try:
        found = list(child.stream(_errors, chosen, job.columns.schema, spec, seconds=SECONDS))
    except (ChildDied, PageCorrupt):
        return Sample()
    return Sample(len(found), tuple(error for error in found if error))


def check_sample(job: CheckedJob, sample: Sample) -> list[Problem]:
    """Whether every row of it has an error, in a job so large that `limits.max_error_rate` will stop it."""
    is_hopeless = len(sample.errors) == sample.num_rows > 0
    if not is_hopeless or job.num_rows < MIN_ROWS_FOR_ERROR_RATE or job.config.limits.max_error_rate >= 1:
        return []
    got = f"an error in each of {sample.num_rows} rows that were tried, the first {sample.errors[0]}"
    return [Problem("prompt", got, "one that fits the rows", "or limits.max_error_rate: 1, to have all the errors")]


def _errors(chosen: list[tuple[InputFile, RowNumbers]], columns: pa.Schema, spec: RenderSpec) -> Iterator[str]:
    """In the child. Of each row its error, or ""."""
    for file, rows in chosen:
        start, stop = int(rows[0]), int(rows[-1]) + 1
        for _, block in read_blocks(file, start, stop, columns, rows, ROWS_EACH):
            planned = render_block(block, spec)
            for number, error in zip(planned["src_row"].to_pylist(), planned["error"].to_pylist(), strict=True):
                yield f"{error['code']} in row {number} of {file.src_path}: {error['message']}" if error else ""
