"""A few rows rendered before anything starts: a prompt that fits none of them is refused in a second, not after an hour
of planning.

The rows are drawn over the whole dataset, since files are often sorted: rows without a prompt, or the longest ones,
come first. Single rows that cannot be rendered do not matter here: in the run each gets an error of its own. Knows how
rows are read and rendered; nothing of Ray.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import pyarrow as pa

from segue.pipeline.dataset.blocks import PageCorrupt, batch_rows_of, group_of, read_blocks
from segue.pipeline.dataset.files import InputFile
from segue.pipeline.jobfile.schema import MIN_ROWS_FOR_ERROR_RATE
from segue.pipeline.problems import JobRefused, Problem
from segue.pipeline.processes.limited import ChildDied, LimitedProcess
from segue.pipeline.prompts.render import RenderSpec, render_block
from segue.pipeline.ready.checks import CheckedJob

SECONDS = 5.0  # of CPU time, from one block of rows to the next
NUM_ROWS = (64, 16, 8)  # that are tried: fewer if more would be too much to read
MAX_GROUPS = 16  # row groups that are opened, each up to its last row that is tried
MAX_BYTES = 512 * 2**20  # of all columns of these, decompressed
MAX_CHANCE = 1e-6  # that a job within its limit is refused because each row that was tried is one of its bad ones

Piece = tuple[InputFile, np.ndarray]  # a file and numbers of rows in one of its row groups, ascending


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
    spec = replace(spec, passed_columns=())
    try:
        found = list(child.stream(_errors, _chosen(job), job.columns.rendered, spec, seconds=SECONDS))
    except (ChildDied, PageCorrupt):
        return Trial()
    trial = Trial(len(found), tuple(error for error in found if error))
    _check_hopeful(job, trial)
    return trial


def _check_hopeful(job: CheckedJob, trial: Trial) -> None:
    is_hopeless = len(trial.errors) == trial.num_rows > 0
    chance = job.config.limits.max_error_rate**trial.num_rows
    if is_hopeless and job.num_rows >= MIN_ROWS_FOR_ERROR_RATE and chance < MAX_CHANCE:
        got = f"an error in each of {trial.num_rows} rows that were tried, the first {trial.errors[0]}"
        hint = "or limits.max_error_rate: 1, to have all the errors"
        raise JobRefused([Problem("prompt", got, "one that fits the rows", hint)])


def _chosen(job: CheckedJob) -> list[Piece]:
    """As many rows as can be read soon."""
    for num_rows in NUM_ROWS:
        pieces = _drawn(job, num_rows)
        if len(pieces) <= MAX_GROUPS and sum(map(_num_bytes, pieces)) <= MAX_BYTES:
            break
    return pieces


def _drawn(job: CheckedJob, num_rows: int) -> list[Piece]:
    """One row from each of `num_rows` equal parts of the job's rows, at random, the same ones each time."""
    total, draw = job.num_rows, random.Random(0)
    edges = [total * part // num_rows for part in range(num_rows + 1)]
    positions = [draw.randrange(start, stop) for start, stop in pairwise(edges) if start < stop]
    stops = list(accumulate(map(len, job.rows)))
    places = np.searchsorted(stops, positions, side="right")
    found: dict[tuple[int, int], list[int]] = {}
    for place, position in zip(places.tolist(), positions, strict=True):
        numbers = job.rows[place]
        row = int(numbers[position - stops[place] + len(numbers)])
        found.setdefault((place, group_of(job.inputs[place], row)), []).append(row)
    return [(job.inputs[place], np.array(rows, np.int64)) for (place, _), rows in found.items()]


def _num_bytes(piece: Piece) -> int:
    file, rows = piece
    return file.row_group_bytes[group_of(file, int(rows[0]))]


def _errors(chosen: list[Piece], columns: pa.Schema, spec: RenderSpec) -> Iterator[str]:
    """In the child. Of each row its error, or ""."""
    for file, rows in chosen:
        start, stop = int(rows[0]), int(rows[-1]) + 1
        for _, block in read_blocks(file, start, stop, columns, rows, batch_rows_of(file)):
            planned = render_block(block, spec)
            for number, error in zip(planned["src_row"].to_pylist(), planned["error"].to_pylist(), strict=True):
                yield f"{error['code']} in row {number} of {file.src_path}: {error['message']}" if error else ""
