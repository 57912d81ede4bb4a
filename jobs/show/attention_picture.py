"""A picture of one prompt's attention under both masks, with the borders of its segments. Needs matplotlib."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from segue.attention.segments import Segment
from segue.jobs.analysis.attention import RowAttention, attention_of_row
from segue.pipeline.ready.job import ReadyJob

FLOOR = 1e-4  # smaller weights have the colour of zero
MAX_LABELLED_TOKENS = 48  # more labels would be too small to read


def draw_attention(job: ReadyJob, row: int, layer: int | None, path: str) -> dict[str, Any]:
    """Write the picture of a row and return what it shows, in numbers. `layer` None is the mean of all layers.

    Raises JobRefused if there is no such row, the row has no prompt, or the model has no such layer.
    """
    found = attention_of_row(job, row, layer)
    what = "mean of all layers and heads" if layer is None else f"layer {layer}, mean of its heads"
    figure = _figure(found)
    figure.suptitle(f"{job.config.name}, {found.origin}: {what}", parse_math=False)
    figure.savefig(path, dpi=150)
    return {
        "picture": path,
        "row": found.origin,
        "tokens": len(found.texts),
        "segments": _spans(found.segments),
        "layer": layer,
    }


def _figure(found: RowAttention) -> Any:
    """A panel for each mask."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.6), layout="constrained")
    panels = figure.subplots(1, len(found.weights))
    shades = LogNorm(vmin=FLOOR, vmax=1.0)
    for axes, (mask, weights) in zip(panels, found.weights.items(), strict=True):
        clipped = weights.numpy().clip(FLOOR / 10)
        image = axes.imshow(clipped, norm=shades, cmap="magma", interpolation="nearest")
        axes.set_title(f"mask: {mask}")
        axes.set_xlabel("key")
        _draw_borders(axes, found.segments)
        _label(axes, found.texts)
    panels[0].set_ylabel("query")
    figure.colorbar(image, ax=list(panels), label="attention weight", shrink=0.8)
    return figure


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
