"""The rows of a finished output of any task, with a column that says whether each is right.

Tables have `src_path`, `src_row`, `group` (null if the row's value in that column is null), `is_error`, and what the
statistics of the task need: `correct` (null if a row has no label or no answer) and `correct_norm`, or
log-probabilities and sizes. Knows the columns of outputs; no statistics.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from segue.pipeline.dataset.columns import is_text
from segue.pipeline.ledger.reading import read_columns
from segue.pipeline.problems import JobRefused, Problem, nearest, shown

TASK_COLUMN = "task"  # rows are grouped by it if they have it and `--by` names no other column
KEY = ["src_path", "src_row"]
# (what LLM-Adapters takes as the answer in a text: the first match; the column with the right answer). Hu et al., arXiv
# 2304.01933.
PRESETS = {"commonsense": (r"answer\d|solution\d|ending\d|option\d|true|false", "answer")}


@dataclass(frozen=True, slots=True)
class Judging:
    """How generated answers are judged, and how rows are grouped."""

    by: str | None = None  # the column whose values are groups
    label: str | None = None  # the column with the right answer
    regex: str | None = None  # finds the answer in the text: its first group, or the whole match
    ignore_case: bool = False


def judging_of(
    *, by: str | None, label: str | None, regex: str | None, preset: str | None, ignore_case: bool
) -> Judging:
    """A preset sets `regex` and `label` where they are None. Raises JobRefused for an unknown preset."""
    if preset is not None:
        if preset not in PRESETS:
            raise JobRefused([Problem("--preset", shown(preset), f"one of {', '.join(PRESETS)}")])
        known_regex, known_label = PRESETS[preset]
        regex, label = regex or known_regex, label or known_label
    return Judging(by, label, regex, ignore_case)


def judged_rows(output: str, task: str, judging: Judging) -> pa.Table:
    """Raises JobRefused if the task cannot be judged, a column is missing, or `judging.regex` is not valid."""
    if task not in _JUDGES:
        wanted = "an output of `segue run`; a training's losses are in its metrics.jsonl"
        raise JobRefused([Problem("task", shown(task), wanted, where=output)])
    return _JUDGES[task](output, judging)


def _choices(output: str, judging: Judging) -> pa.Table:
    return _rows(output, judging, ["correct", "correct_norm"])


def _loglikelihoods(output: str, judging: Judging) -> pa.Table:
    rows = _rows(output, judging, ["logprob", "is_greedy"])
    return rows.rename_columns({"is_greedy": "correct"})


def _texts(output: str, judging: Judging) -> pa.Table:
    return _rows(output, judging, ["logprob", "num_tokens", "num_words", "num_bytes"])


def _answers(output: str, judging: Judging) -> pa.Table:
    """Generated texts, compared with the column of right answers."""
    if judging.label is None:
        wanted = "the column with the right answers, as the output has it"
        raise JobRefused([Problem("--label", "nothing", wanted, where=output)])
    try:
        pattern = re.compile(judging.regex, re.IGNORECASE if judging.ignore_case else 0) if judging.regex else None
    except re.error as error:
        raise JobRefused([Problem("--regex", shown(judging.regex), f"a regular expression ({error})")]) from None
    rows = _rows(output, judging, ["generated_text", judging.label])
    texts, labels = rows["generated_text"].to_pylist(), _as_text(rows[judging.label]).to_pylist()
    rows = rows.select([*KEY, "group", "is_error"])
    answers = [None if text is None else _extracted(text, pattern) for text in texts]
    correct = [
        None if text is None or label is None else _is_same(answer, label, judging.ignore_case)
        for text, answer, label in zip(texts, answers, labels, strict=True)
    ]
    unparsed = [text is not None and answer is None for text, answer in zip(texts, answers, strict=True)]
    return rows.append_column("correct", pa.array(correct, pa.bool_())).append_column("unparsed", pa.array(unparsed))


def _extracted(text: str, pattern: re.Pattern[str] | None) -> str | None:
    if pattern is None:
        return text
    found = pattern.search(text)
    return None if found is None else next((group for group in found.groups() if group is not None), found[0])


def _is_same(answer: str | None, label: str, ignore_case: bool) -> bool:
    if answer is None:
        return False
    one, other = answer.strip(), label.strip()
    return one.casefold() == other.casefold() if ignore_case else one == other


def _rows(output: str, judging: Judging, names: Sequence[str]) -> pa.Table:
    tables = list(_tables(output, judging, names))
    return pa.concat_tables(tables) if tables else _empty(names)


def _tables(output: str, judging: Judging, names: Sequence[str]) -> Iterator[pa.Table]:
    def columns(schema: pa.Schema) -> list[str]:
        missing = [name for name in names if name not in schema.names]
        if missing:
            wanted = "a column that the output has; list it in output.columns of the job"
            hint = nearest(missing[0], schema.names)
            raise JobRefused([Problem("--label", shown(missing[0]), wanted, hint, where=output)])
        return [*KEY, *names, "error", *_group_column(schema, judging, output)]

    for table in read_columns(output, columns):
        by = judging.by or TASK_COLUMN
        has_groups = by in table.column_names
        group = _as_text(table[by]) if has_groups else pa.array(["all"] * len(table))
        own = {name: table[name] for name in (*KEY, *names)}
        # Our own columns come last, because a label column may have the name of one of them.
        yield pa.table(own | {"group": group, "is_error": table["error"].is_valid()})


def _group_column(schema: pa.Schema, judging: Judging, output: str) -> list[str]:
    """The column of the groups, if there is one. Raises JobRefused if `--by` names a column that is not there."""
    if judging.by is None:
        return [TASK_COLUMN] if TASK_COLUMN in schema.names and is_text(schema.field(TASK_COLUMN).type) else []
    if judging.by not in schema.names:
        wanted = "a column that the output has"
        raise JobRefused([Problem("--by", shown(judging.by), wanted, nearest(judging.by, schema.names), where=output)])
    return [judging.by]


def _as_text(column: pa.ChunkedArray) -> pa.Array:
    """Any value as text. Bytes that are not UTF-8 become U+FFFD: a row may have such bytes in a column that its prompt
    does not use."""
    if is_text(column.type) and not pa.types.is_null(column.type):
        values = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        return pa.array([None if value is None else value.decode("utf-8", "replace") for value in values], pa.string())
    return pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())


def _empty(names: Sequence[str]) -> pa.Table:
    columns: dict[str, Any] = {name: pa.array([], pa.bool_()) for name in (*names, "is_error")}
    return pa.table(columns | {"src_path": pa.array([], pa.string()), "src_row": pa.array([], pa.int64()), "group": []})


_JUDGES = {"choose": _choices, "loglikelihood": _loglikelihoods, "perplexity": _texts, "generate": _answers}
