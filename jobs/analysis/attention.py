"""The attention of one row's prompt under both masks. The prompt is rendered as a run renders it. Draws nothing."""

from dataclasses import dataclass, replace

import torch

from segue.attention.segments import Segment
from segue.pipeline.dataset.blocks import read_rows
from segue.pipeline.problems import JobRefused, Problem
from segue.pipeline.prompts.check import checked_encoder
from segue.pipeline.ready.job import ReadyJob, today
from segue.pipeline.storage.models import local_source
from segue.workers.errors import RowError
from segue.workers.models.attention_maps import attention_map, load_for_maps

MASKS = ("causal", "segment")


@dataclass(frozen=True, slots=True)
class RowAttention:
    """What the tokens of one row attend to."""

    origin: str  # the file of the row, and its number there
    segments: list[Segment]  # before a mask applies
    texts: list[str]  # of each token
    weights: dict[str, torch.Tensor]  # by mask: [T, T], a line for each query


def attention_of_row(job: ReadyJob, number: int, layer: int | None) -> RowAttention:
    """`number` counts rows in the order of the input, from 0. `layer` None is the mean of all layers.

    Raises JobRefused if there is no such row, the row has no prompt, or the model has no such layer.
    """
    origin, segments, texts = _prompt_of_row(job, number)
    source, adapter = local_source(job.config.model.source), job.config.model.adapter
    model = load_for_maps(source, adapter=adapter and local_source(adapter), revision=job.facts.commit)
    try:
        weights = {mask: attention_map(model, segments, mask, layer) for mask in MASKS}
    except ValueError as error:
        raise JobRefused([Problem("--layer" if layer is not None else "--row", "", str(error))]) from None
    return RowAttention(origin, segments, texts, weights)


def _prompt_of_row(job: ReadyJob, number: int) -> tuple[str, list[Segment], list[str]]:
    """(origin, segments, texts) of a RowAttention. Raises JobRefused."""
    encoder = checked_encoder(replace(job.render_spec(today()), mask="segment"))  # which finds the borders
    start = 0
    for file in job.checked.inputs:
        if start <= number < start + file.num_rows:
            (row,) = read_rows(file, number - start, number - start + 1, job.checked.columns.schema).to_pylist()
            try:
                segments = list(encoder.encode(row))
            except RowError as error:
                raise JobRefused([Problem("--row", f"{number}, which has {error.code}", error.message)]) from None
            texts = [str(encoder.tokenizer.decode([token])) for segment in segments for token in segment.token_ids]
            return f"{file.src_path}:{number - start}", segments, texts
        start += file.num_rows
    raise JobRefused([Problem("--row", str(number), f"a row of the input, 0 to {start - 1}")])
