"""A picture of one prompt's attention under both masks, with the borders of its segments. Needs matplotlib."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from segue.attention.segments import Segment
from segue.jobs.analysis.one_prompt import prompt_of_row
from segue.pipeline.problems import JobRefused, Problem
from segue.pipeline.ready.job import ReadyJob
from segue.pipeline.storage.models import local_source
from segue.workers.models.attention_maps import attention_map, load_for_maps

MASKS = ("causal", "segment")
FLOOR = 1e-4  # smaller weights have the colour of zero
MAX_LABELLED_TOKENS = 48  # more labels would be too small to read


def draw_attention(job: ReadyJob, row: int, layer: int | None, path: str) -> dict[str, Any]:
    """Write the picture of a row and return what it shows, in numbers. `layer` None is the mean of all layers.

    Raises JobRefused if the row has no prompt, or if the model has no such layer.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    origin, segments, texts = prompt_of_row(job, row)
    source, adapter = local_source(job.config.model.source), job.config.model.adapter
    model = load_for_maps(source, adapter=adapter and local_source(adapter), revision=job.facts.commit)
    try:
        maps = {mask: attention_map(model, segments, mask, layer).numpy() for mask in MASKS}
    except ValueError as error:
        raise JobRefused([Problem("--layer" if layer is not None else "--row", "", str(error))]) from None
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    panels = figure.subplots(1, 2)
    shades = LogNorm(vmin=FLOOR, vmax=1.0)
    for axes, (mask, weights) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(weights.clip(FLOOR / 10), norm=shades, cmap="magma", interpolation="nearest")
        axes.set_title(f"mask: {mask}")
        axes.set_xlabel("key")
        _draw_borders(axes, segments)
        _label(axes, texts)
    panels[0].set_ylabel("query")
    figure.colorbar(image, ax=list(panels), label="attention weight", shrink=0.8)
    what = "mean of all layers and heads" if layer is None else f"layer {layer}, mean of its heads"
    figure.suptitle(f"{job.config.name}, {origin}: {what}", parse_math=False)
    figure.savefig(path, dpi=150)
    return {"picture": path, "row": origin, "tokens": len(texts), "segments": _spans(segments), "layer": layer}


def _spans(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    ends = list(accumulate(map(len, segments)))
    return [
        {"start": end - len(segment), "stop": end, "bidirectional": segment.bidirectional}
        for segment, end in zip(segments, ends, strict=True)
    ]


def _draw_borders(axes: Any, segments: Sequence[Segment]) -> None:
    """A square around each segment. The segment mask adds what lies in the upper triangle of a square."""
    from matplotlib.patches import Rectangle

    for span in _spans(segments):
        size, style = span["stop"] - span["start"], "-" if span["bidirectional"] else ":"
        corner = (span["start"] - 0.5, span["start"] - 0.5)
        axes.add_patch(Rectangle(corner, size, size, fill=False, edgecolor="cyan", linestyle=style, linewidth=1.2))


def _label(axes: Any, texts: Sequence[str]) -> None:
    if len(texts) > MAX_LABELLED_TOKENS:
        return
    shown = ["".join(char if char.isprintable() else "·" for char in text) or "·" for text in texts]
    axes.set_xticks(range(len(texts)), shown, rotation=90, fontsize=6, parse_math=False)
    axes.set_yticks(range(len(texts)), shown, fontsize=6, parse_math=False)
