"""What `segue evaluate` prints for people: a table of groups, and a comparison of two outputs."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from segue.jobs.analysis.evaluate import Evaluation, Group, Pairing
from segue.jobs.show.lines import console, plain

TABLE_WIDTH = 160


def _share(value: float) -> str:
    return f"{value:.4f}"


def _interval(value: tuple[float, float]) -> str:
    return f"{value[0]:.4f} to {value[1]:.4f}"


# (field of Group, heading, how a value is shown)
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("acc", "acc", _share),
    ("acc_interval", "95%", _interval),
    ("acc_norm", "acc_norm", _share),
    ("acc_norm_interval", "95%", _interval),
    ("mean_logprob", "mean logprob", lambda value: f"{value:.3f}"),
    ("word_perplexity", "word perplexity", lambda value: f"{value:.4g}"),
    ("byte_perplexity", "byte perplexity", lambda value: f"{value:.4g}"),
    ("bits_per_byte", "bits per byte", _share),
    ("token_perplexity", "token perplexity", lambda value: f"{value:.4g}"),
    ("n", "n", lambda value: f"{value:,}"),
    ("unparsed", "no answer found", lambda value: f"{value:,}"),
    ("unlabelled", "no label", lambda value: f"{value:,}"),
    ("errors", "errors", lambda value: f"{value:,}"),
)


def show_evaluation(evaluation: Evaluation) -> None:
    """Print one line for each group. Columns that no group has are left out."""
    out = console()
    out.width = max(out.width, TABLE_WIDTH)  # a broken line is hard to read, and a pipe has no width
    out.print(f"{plain(evaluation.job)}: task {evaluation.task}, {plain(evaluation.output)}")
    columns = [column for column in COLUMNS if _is_shown(column[0], evaluation.groups)]
    table = Table("group", box=None, pad_edge=False)
    for _, heading, _ in columns:
        table.add_column(heading, justify="right")
    for group in evaluation.groups:
        values = [(getattr(group, name), show) for name, _, show in columns]
        table.add_row(plain(group.name), *("" if value is None else show(value) for value, show in values))
    out.print(table)


def show_pairings(pairings: Sequence[Pairing]) -> None:
    """Print how often each output alone is right, and how likely it is that this is chance."""
    out = console()
    for pair in pairings:
        out.print(
            f"{pair.metric}: {pair.n:,} rows in both outputs; right in both {pair.both:,}, "
            f"only in the first {pair.only_first:,}, only in the second {pair.only_second:,}, "
            f"in neither {pair.neither:,}; McNemar p = {pair.p_value:.4g}"
        )


def _is_shown(name: str, groups: Sequence[Group]) -> bool:
    values = [getattr(group, name) for group in groups]
    return any(values) if name in ("unlabelled", "errors") else any(value is not None for value in values)
