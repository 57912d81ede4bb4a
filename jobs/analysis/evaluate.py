"""The accuracy or perplexity of a finished output by group of rows, with intervals; and two outputs compared.

`acc`, `acc_norm`, `word_perplexity` and the others mean what they mean in lm-evaluation-harness. A row with an error or
without a label is counted, but not judged. Knows output folders and their columns; prints nothing.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from segue.jobs.analysis.judge import KEY, Judging, judged_rows
from segue.jobs.analysis.statistics import mcnemar, wilson_interval
from segue.pipeline.ledger.reading import finished_manifest
from segue.pipeline.problems import JobRefused, Problem


@dataclass(slots=True)
class Group:
    """The statistics of a group of rows. Those that the task does not have are None."""

    name: str
    n: int = 0  # rows that were judged
    errors: int = 0
    unlabelled: int = 0
    unparsed: int | None = None  # generated texts in which the regex finds nothing; they count as wrong
    acc: float | None = None
    acc_interval: tuple[float, float] | None = None  # 95%
    acc_norm: float | None = None
    acc_norm_interval: tuple[float, float] | None = None
    mean_logprob: float | None = None
    word_perplexity: float | None = None
    byte_perplexity: float | None = None
    bits_per_byte: float | None = None
    token_perplexity: float | None = None


@dataclass(slots=True)
class Pairing:
    """How often two outputs are right on the same rows."""

    metric: str
    n: int
    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float  # McNemar


@dataclass(slots=True)
class Evaluation:
    """The statistics of one output."""

    output: str
    job: str
    task: str
    groups: list[Group]  # if there are several, the last one has all rows


def evaluate(output: str, judging: Judging) -> tuple[Evaluation, pa.Table]:
    """The statistics of an output, and its rows with `correct` and, for choices, `correct_norm`.

    Raises ForeignOutput if this is not a finished output, and JobRefused if a column is missing.
    """
    manifest = finished_manifest(output)
    task = str(manifest.fields["task"])
    rows = judged_rows(output, task, judging)
    names = sorted(rows["group"].unique().to_pylist(), key=str)
    groups = [_MEASURES[task](name, rows.filter(_equals(rows["group"], name))) for name in names]
    if len(groups) != 1:
        groups.append(_MEASURES[task]("all", rows))
    return Evaluation(output, manifest.name, task, groups), rows


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """As JSON, without the statistics that the task does not have."""
    groups = [
        {name: value for name, value in asdict(group).items() if value is not None} for group in evaluation.groups
    ]
    return asdict(evaluation) | {"groups": groups}


def compare(first: pa.Table, second: pa.Table) -> list[Pairing]:
    """Paired comparisons of the rows that are judged in both outputs, joined by `src_path` and `src_row`.

    Raises JobRefused if there are no such rows.
    """
    shared = {*first.column_names} & {*second.column_names}
    pairings = []
    for metric in sorted(shared & {"correct", "correct_norm"}):
        left, right = (rows.select([*KEY, metric]).filter(rows[metric].is_valid()) for rows in (first, second))
        pairs = left.join(right, KEY, join_type="inner", right_suffix=" of second")
        pairings.append(_pairing(metric, pairs[metric], pairs[f"{metric} of second"]))
    if not any(pairing.n for pairing in pairings):
        wanted = "a row with a right or wrong answer that both outputs have, by src_path and src_row"
        raise JobRefused([Problem("", "none", wanted)])
    return pairings


def _pairing(metric: str, first: pa.ChunkedArray, second: pa.ChunkedArray) -> Pairing:
    both = int(_total(pc.call_function("and", [first, second])))
    only_first, only_second = int(_total(first)) - both, int(_total(second)) - both
    neither = len(first) - both - only_first - only_second
    return Pairing(metric, len(first), both, only_first, only_second, neither, mcnemar(only_first, only_second))


def _accuracy(name: str, rows: pa.Table) -> Group:
    group = _counted(name, rows, "correct")
    group.acc, group.acc_interval = _share(rows["correct"])
    if "correct_norm" in rows.column_names:
        group.acc_norm, group.acc_norm_interval = _share(rows["correct_norm"])
    if "unparsed" in rows.column_names:
        group.unparsed = int(_total(rows["unparsed"]))
    return group


def _likelihood(name: str, rows: pa.Table) -> Group:
    group = _accuracy(name, rows)
    group.mean_logprob = _total(rows["logprob"]) / group.n if group.n else None
    return group


def _perplexity(name: str, rows: pa.Table) -> Group:
    """Long texts weigh more than short ones, as in lm-evaluation-harness."""
    group = _counted(name, rows, "logprob")
    if group.n:
        logprob = _total(rows["logprob"])
        group.word_perplexity = _finite_exp(-logprob / _total(rows["num_words"]))
        group.byte_perplexity = _finite_exp(-logprob / _total(rows["num_bytes"]))
        group.token_perplexity = _finite_exp(-logprob / _total(rows["num_tokens"]))
        group.bits_per_byte = -logprob / _total(rows["num_bytes"]) / math.log(2)
    return group


def _counted(name: str | None, rows: pa.Table, judged: str) -> Group:
    errors = int(_total(rows["is_error"]))
    n = len(rows) - rows[judged].null_count
    return Group("(none)" if name is None else name, n, errors, len(rows) - n - errors)


def _share(column: pa.ChunkedArray) -> tuple[float | None, tuple[float, float]]:
    right, judged = int(_total(column)), len(column) - column.null_count
    return (right / judged if judged else None), wilson_interval(right, judged)


def _total(column: pa.ChunkedArray) -> float:
    """The sum of numbers, or the number of true values. Nulls are left out."""
    return pc.call_function("sum", [column]).as_py() or 0


def _equals(column: pa.ChunkedArray, value: str | None) -> pa.ChunkedArray:
    return column.is_null() if value is None else pc.call_function("equal", [column, pa.scalar(value)])


def _finite_exp(value: float) -> float | None:
    """None if the result is too large for fp64, since JSON has no infinity. A text without spaces is a single word."""
    return math.exp(value) if value < 700 else None


_MEASURES = {"choose": _accuracy, "loglikelihood": _likelihood, "perplexity": _perplexity, "generate": _accuracy}
