"""The results of scoring tasks: columns, and a row's values from the scores of its requests.

Numbers have lm-evaluation-harness' meaning: `choice` has the largest sum of log-probabilities, `choice_norm` the
largest for each of its characters; the first of equals. Sums are fp64. Knows Arrow and scores; no model, no storage.
"""

import math
from collections.abc import Sequence

import pyarrow as pa

from segue.pipeline.ledger.columns import error_value, framed_schema
from segue.workers.rows.request import RequestOutput, Score
from segue.workers.scoring.rows import ScoreRow
from segue.workers.scoring.template import Task
from segue.workers.scoring.windows import total_score

_FIELDS: dict[Task, list[pa.Field]] = {
    "choose": [
        pa.field("choice", pa.int32()),
        pa.field("choice_norm", pa.int32()),
        pa.field("choice_logprobs", pa.list_(pa.float64())),
        pa.field("choice_num_tokens", pa.list_(pa.int32())),
        pa.field("choice_is_greedy", pa.list_(pa.bool_())),
        pa.field("correct", pa.bool_()),  # null for a row without label
        pa.field("correct_norm", pa.bool_()),
    ],
    "loglikelihood": [
        pa.field("logprob", pa.float64()),
        pa.field("num_tokens", pa.int32()),
        pa.field("is_greedy", pa.bool_()),
    ],
    "perplexity": [
        pa.field("logprob", pa.float64()),
        pa.field("num_tokens", pa.int32()),
        pa.field("num_words", pa.int32()),
        pa.field("num_bytes", pa.int32()),
        pa.field("perplexity", pa.float64()),  # a token
    ],
}


def score_schema(passed: pa.Schema, task: Task) -> pa.Schema:
    """Passed-through columns first, then provenance and results."""
    return framed_schema(passed, _FIELDS[task])


def score_values(row: ScoreRow, task: Task, outputs: Sequence[RequestOutput]) -> dict[str, object]:
    """One row's results from those of its requests; what fails one of them fails the row."""
    counts: dict[str, object] = {"num_input_tokens": sum(output.num_prompt_tokens for output in outputs)}
    failed = next((output.error for output in outputs if output.error is not None), None)
    if failed is not None:
        return counts | {"error": error_value(failed)}
    counts |= {"num_cached_tokens": sum(output.num_cached_tokens for output in outputs), "error": None}
    scores = [output.score for output in outputs if output.score is not None]
    return counts | _ANSWERS[task](row, scores)


def _choose(row: ScoreRow, scores: Sequence[Score]) -> dict[str, object]:
    logprobs = [score.logprob for score in scores]
    choice = _first_largest(logprobs)
    choice_norm = _first_largest([_a_character(*pair) for pair in zip(logprobs, row.sizes, strict=True)])
    has_label = row.label is not None
    return {
        "choice": choice,
        "choice_norm": choice_norm,
        "choice_logprobs": logprobs,
        "choice_num_tokens": [score.num_tokens for score in scores],
        "choice_is_greedy": [score.is_greedy for score in scores],
        "correct": choice == row.label if has_label else None,
        "correct_norm": choice_norm == row.label if has_label else None,
    }


def _loglikelihood(row: ScoreRow, scores: Sequence[Score]) -> dict[str, object]:
    score = scores[0]
    return {"logprob": score.logprob, "num_tokens": score.num_tokens, "is_greedy": score.is_greedy}


def _perplexity(row: ScoreRow, scores: Sequence[Score]) -> dict[str, object]:
    total = total_score(scores)
    num_words, num_bytes = row.sizes
    return {
        "logprob": total.logprob,
        "num_tokens": total.num_tokens,
        "num_words": num_words,
        "num_bytes": num_bytes,
        "perplexity": math.exp(min(-total.logprob / total.num_tokens, 700.0)),  # beyond that is no fp64 number
    }


_ANSWERS = {"choose": _choose, "loglikelihood": _loglikelihood, "perplexity": _perplexity}


def _a_character(logprob: float, num_chars: int) -> float:
    """An empty choice has no characters to share its log-probability."""
    return logprob / num_chars if num_chars else -math.inf


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: (values[index], -index))
