"""An output folder as one HTML page that opens anywhere: it loads no script, no font and no picture.

Text of rows stays text: the template escapes everything, and the page's own policy forbids scripts and requests. Knows
profiles of outputs and the layout of the page. Reads no file but its template.
"""

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segue.jobs.analysis.profile import Histogram, Profile
from segue.jobs.analysis.statistics import wilson_interval
from segue.pipeline.ledger.columns import ANY_RESULT_COLUMN
from segue.pipeline.problems import redact

TEMPLATES = Path(__file__).parents[1] / "templates"
MAX_ANSWERS_SHOWN = 12
MAX_TEXT_CHARS = 2000
MAX_POINTS = 120  # of the curve; each is a step of two corners
MAX_LEVELS = 12  # of the tree that are drawn
MAX_BINS = 12
LABELLED_PERCENT = 8  # narrower boxes have no room for a label
TEXTS = ("generated_text", "choice", "samples", "error")  # result columns that are shown large


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a chart."""

    label: str
    count: int
    share: float  # of all rows, 0 to 1
    width: float  # percent of the longest bar


@dataclass(frozen=True, slots=True)
class Box:
    """A shared segment in the picture of the tree. `left` and `width` are percentages of the picture."""

    left: float
    width: float
    level: int
    node: dict[str, Any]

    @property
    def title(self) -> str:
        kind = "bidirectional" if self.node["bidirectional"] else "causal"
        return (
            f"{self.node['num_tokens']:,} tokens ({kind}) from position {self.node['start']:,}, "
            f"in {self.node['num_rows']:,} requests: {self.node['tokens_saved']:,} tokens saved; "
            f"first in {self.node['first_row']}"
        )


@dataclass(frozen=True, slots=True)
class Curve:
    """Rows over time, as an SVG polyline in a box of 1000 by 200."""

    points: str
    num_rows: int
    seconds: float
    started: str
    rows_per_second: float
    tokens_per_second: float


def write_report(profile: Profile, path: str | Path, hourly_price: float | None = None) -> None:
    """Raises OSError if the page cannot be written."""
    Path(path).write_text(report_html(profile, hourly_price), encoding="utf-8")


def report_html(profile: Profile, hourly_price: float | None = None) -> str:
    """The page. `hourly_price` is the price of one worker: of its GPUs, or of its share of a machine."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["percent"] = lambda value: f"{value:.1%}"
    environment.filters["span"] = _span
    status, stats = profile.status, profile.manifest.stats
    return environment.get_template("report.html.j2").render(
        status=status,
        manifest=profile.manifest,
        profile=profile,
        num_errors=sum(status.errors.values()),
        reused=1 - status.tokens_computed / answered if (answered := profile.input_tokens.total) else 0.0,
        stats=stats,
        boxes=tree_boxes(stats["top_shared"]),
        curve=curve(profile.commits, profile.runs[0][0] if profile.runs else None),
        rows_per_second=status.rows_done / profile.seconds_at_work if profile.seconds_at_work else None,
        labelled_percent=LABELLED_PERCENT,
        input_bars=histogram_bars(profile.input_tokens),
        generated_bars=histogram_bars(profile.generated_tokens),
        answer_bars=answer_bars(profile),
        accuracy=_accuracy(profile.correct),
        cost=_cost(profile, hourly_price),
        samples=[_parts(row) for row in profile.samples],
        configuration=redact(json.dumps(profile.manifest.job, indent=2, ensure_ascii=False, sort_keys=True)),
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def tree_boxes(nodes: Sequence[dict[str, Any]]) -> list[Box]:
    """Shared segments as boxes. A box lies below the nearest listed segment that it continues, and is as wide as the
    tokens saved by it and by all boxes below it."""
    ordered = sorted(nodes, key=lambda node: (node["start"], node["first_request"]))
    children: dict[int | None, list[int]] = {}
    for index, node in enumerate(ordered):
        above = [i for i in range(index) if _is_above(ordered[i], node)]
        children.setdefault(above[-1] if above else None, []).append(index)

    def saved(index: int) -> int:
        return ordered[index]["tokens_saved"] + sum(saved(child) for child in children.get(index, ()))

    total = sum(saved(root) for root in children.get(None, ()))
    boxes: list[Box] = []

    def place(indices: Sequence[int], left: float, level: int) -> None:
        for index in sorted(indices, key=lambda i: ordered[i]["first_request"]):
            width = 100 * saved(index) / total
            boxes.append(Box(round(left, 3), round(width, 3), level, ordered[index]))
            place(children.get(index, ()), left, level + 1)
            left += width

    place(children.get(None, ()), 0.0, 0)
    return [box for box in boxes if box.level < MAX_LEVELS]


def _is_above(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether every request of `other` continues `one`. In depth-first order such requests are contiguous."""
    is_inside = one["first_request"] <= other["first_request"] < one["first_request"] + one["num_rows"]
    return is_inside and one["start"] + one["num_tokens"] <= other["start"]


def curve(commits: Sequence[tuple[float, int, int]], begin: float | None) -> Curve | None:
    """Committed rows over time; `begin` is the start of the first run, if known. None if all rows have one time."""
    if not commits:
        return None
    start, end = min(commits[0][0], begin or commits[0][0]), commits[-1][0]
    if start == end:
        return None
    rows = sum(commit[1] for commit in commits)
    done, points = 0, [(0.0, 0)]  # a line of steps, because a shard is committed as a whole
    every = max(1, len(commits) // MAX_POINTS)
    for number, (moment, num_rows, _) in enumerate(commits):
        done += num_rows
        if number % every == 0 or number == len(commits) - 1:
            x = 1000 * (moment - start) / (end - start)
            points += [(x, points[-1][1]), (x, done)]
    seconds = end - start
    return Curve(
        points=" ".join(f"{x:.1f},{200 - 200 * y / rows:.1f}" for x, y in points),
        num_rows=rows,
        seconds=seconds,
        started=datetime.datetime.fromtimestamp(start, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        rows_per_second=rows / seconds,
        tokens_per_second=sum(commit[2] for commit in commits) / seconds,
    )


def histogram_bars(histogram: Histogram) -> list[Bar]:
    return _bars([(_range(low, high), count) for low, high, count in histogram.bins(MAX_BINS)])


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def answer_bars(profile: Profile) -> list[Bar]:
    """The most frequent answers. Empty if nearly every row has an answer of its own."""
    answers = profile.answers
    if not answers or len(answers) > max(MAX_ANSWERS_SHOWN, sum(answers.values()) // 2):
        return []
    names = _choice_names(profile)
    common = [(names.get(text, text) or "(nothing)", count) for text, count in answers.most_common(MAX_ANSWERS_SHOWN)]
    rest = sum(answers.values()) - sum(count for _, count in common)
    return _bars([*common, ("others", rest)] if rest else common)


def _choice_names(profile: Profile) -> dict[str, str]:
    """The texts of the numbered choices of task `choose`, if the job file lists them for all rows."""
    if profile.status.task != "choose":
        return {}
    listed = (profile.manifest.job.get("scoring") or {}).get("choices")
    named = [str(choice).strip() for choice in listed] if isinstance(listed, list) else []
    return {str(n): f"{n}: {named[n]}" if n < len(named) else f"choice {n}" for n in range(max(len(named), 1000))}


def _bars(counts: Sequence[tuple[str, int]]) -> list[Bar]:
    total, largest = sum(count for _, count in counts), max((count for _, count in counts), default=0)
    return [Bar(label, count, count / total, round(100 * count / largest, 2)) for label, count in counts if total]


def _accuracy(correct: tuple[int, int] | None) -> dict[str, Any] | None:
    if correct is None or not correct[1]:
        return None
    right, labelled = correct
    low, high = wilson_interval(right, labelled)
    return {"right": right, "labelled": labelled, "share": right / labelled, "low": low, "high": high}


def _cost(profile: Profile, hourly_price: float | None) -> dict[str, Any] | None:
    if hourly_price is None:
        return None
    workers = int((profile.manifest.job.get("workers") or {}).get("max_size", 1))
    total = profile.seconds_at_work / 3600 * workers * hourly_price
    rows = profile.status.rows_done
    per_million = 1e6 * total / rows if rows else None
    return {"total": total, "workers": workers, "price": hourly_price, "per_million_rows": per_million}


def _parts(row: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The columns of a row: what was given, the large results, and the details."""
    parts: dict[str, list[tuple[str, str]]] = {"given": [], "result": [], "details": []}
    for name, value in row.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            shown = text if len(text) <= MAX_TEXT_CHARS else text[:MAX_TEXT_CHARS] + " …"
            is_result = name in ANY_RESULT_COLUMN
            parts["given" if not is_result else "result" if name in TEXTS else "details"].append((name, shown))
    return parts


def _span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"
