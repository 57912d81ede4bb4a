"""One row's prompt as a run renders it, without planning the other rows."""

from segue.attention.segments import Segment
from segue.pipeline.dataset.blocks import read_rows
from segue.pipeline.problems import JobRefused, Problem
from segue.pipeline.prompts.check import checked_encoder
from segue.pipeline.ready.job import ReadyJob, today
from segue.workers.errors import RowError


def prompt_of_row(job: ReadyJob, number: int) -> tuple[str, list[Segment], list[str]]:
    """(where the row comes from, its segments before a mask applies, the text of each token).

    `number` counts rows in the order of the input, from 0. Raises JobRefused if there is no such row, or if the row has
    an error instead of a prompt.
    """
    encoder = checked_encoder(job.render_spec(today()))
    start = 0
    for file in job.checked.inputs:
        if start <= number < start + file.num_rows:
            (row,) = read_rows(file, number - start, number - start + 1, job.checked.columns.schema).to_pylist()
            try:
                segments = list(encoder.encode(row))
            except RowError as error:
                raise JobRefused([Problem("--row", f"{number}, which has {error.code}", error.message)]) from None
            ids = [token for segment in segments for token in segment.token_ids]
            return (
                f"{file.src_path}:{number - start}",
                segments,
                [str(encoder.tokenizer.decode([token])) for token in ids],
            )
        start += file.num_rows
    raise JobRefused([Problem("--row", str(number), f"a row of the input, 0 to {start - 1}")])
