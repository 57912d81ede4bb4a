"""The columns that a job adds to its rows: names, types, the values of one row, and the table of one shard.

The schema depends on the job alone, not on the answers: a shard in which every row failed has the same schema. The
numbers of scoring tasks mean what they mean in lm-evaluation-harness: `choice` has the largest sum of
log-probabilities, `choice_norm` the largest sum per character; of equal choices the first. Sums are fp64.

Knows Arrow and answers; no model, no storage.
"""

import math
from collections.abc import Callable, Sequence

import pyarrow as pa

from segue.workers.errors import RowError
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import CompletionOutput, RequestOutput, Score
from segue.workers.scoring.rows import ScoreRow
from segue.workers.scoring.template import Task
from segue.workers.scoring.windows import total_score

ERROR_TYPE = pa.struct([("code", pa.string()), ("message", pa.string())])
_TOKEN_LOGPROB = [("token_id", pa.int32()), ("logprob", pa.float32())]
_LOGPROBS = pa.field("logprobs", pa.list_(pa.struct([*_TOKEN_LOGPROB, ("top", pa.list_(pa.struct(_TOKEN_LOGPROB)))])))

_PROVENANCE = [pa.field("src_path", pa.string()), pa.field("src_row", pa.int64())]
_COUNTS = [pa.field("num_input_tokens", pa.int32()), pa.field("num_cached_tokens", pa.int32())]
_ANSWER: dict[Task, list[pa.Field]] = {
    "generate": [
        pa.field("generated_text", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("num_generated_tokens", pa.int32()),
    ],
    "choose": [
        pa.field("choice", pa.int32()),
        pa.field("choice_norm", pa.int32()),
        pa.field("choice_logprobs", pa.list_(pa.float64())),
        pa.field("choice_num_tokens", pa.list_(pa.int32())),
        pa.field("choice_is_greedy", pa.list_(pa.bool_())),
        pa.field("correct", pa.bool_()),  # null for a row without a label
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
        pa.field("perplexity", pa.float64()),  # per token
    ],
}
_TRUNCATED = pa.field("num_truncated_tokens", pa.int32())
_REASONING = pa.field("reasoning_text", pa.string())  # null for an answer without reasoning
_OPTIONAL: dict[Task, tuple[str, ...]] = {
    "generate": (_TRUNCATED.name, "logprobs", _REASONING.name, "samples"),
}
Split = Callable[[RequestOutput, CompletionOutput], tuple[str | None, str]]  # (reasoning, the text after it)

RESULT_COLUMNS: dict[Task, tuple[str, ...]] = {
    **{
        task: (*(field.name for field in (*_PROVENANCE, *answer, *_COUNTS)), *_OPTIONAL.get(task, ()), "error")
        for task, answer in _ANSWER.items()
    },
    "finetune": (),  # a training has no rows of results
}
ANY_RESULT_COLUMN = frozenset(name for names in RESULT_COLUMNS.values() for name in names)


def result_schema(
    passed: pa.Schema,
    params: SamplingParams,
    task: Task = "generate",
    *,
    has_row_params: bool = False,
    has_reasoning: bool = False,
) -> pa.Schema:
    """Passed-through columns, provenance, the answer, token counts and the error, in this order.

    `num_truncated_tokens`, `logprobs` and `samples` are there only if the job asks for them, or if its rows may
    (`has_row_params`); `reasoning_text` only if reasoning is split from answers (`has_reasoning`).
    """
    answer, counts, samples = _ANSWER[task], _COUNTS, []
    if task == "generate":
        counts = counts if params.truncate_prompt_tokens is None and not has_row_params else [*counts, _TRUNCATED]
        answer = answer if params.logprobs is None and not has_row_params else [*answer, _LOGPROBS]
        answer = [*answer, _REASONING] if has_reasoning else answer
        samples = [pa.field("samples", pa.list_(pa.struct(answer)))] if params.n > 1 or has_row_params else []
    return pa.schema([*passed, *_PROVENANCE, *answer, *counts, *samples, pa.field("error", ERROR_TYPE)])


def result_table(schema: pa.Schema, passed: pa.Table, rows: Sequence[dict[str, object]]) -> pa.Table:
    """The shard: passed-through columns as they are, results from `rows`, in one fixed schema."""
    columns = [
        passed[field.name]
        if field.name in passed.column_names
        else pa.array([row.get(field.name) for row in rows], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def error_value(error: RowError) -> dict[str, str]:
    """An error as the `error` column holds it."""
    return {"code": str(error.code), "message": error.message}


def result_row(output: RequestOutput, split: Split | None = None) -> dict[str, object]:
    """The results of one generated row; the scalar columns are those of sample 0. After an error there is no answer.

    `split` takes the reasoning out of an answer.
    """
    if output.error is not None:
        return {"num_input_tokens": len(output.prompt_token_ids) or None, "error": error_value(output.error)}
    answers = [_answer(sample, split and split(output, sample)) for sample in output.outputs]
    return {
        **answers[0],
        "num_input_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "samples": answers,
        "error": None,
    }


def _answer(sample: CompletionOutput, parts: tuple[str | None, str] | None) -> dict[str, object]:
    reasoning, text = parts or (None, sample.text)
    logprobs = None
    if sample.logprobs is not None:
        logprobs = [
            {
                "token_id": token.token_id,
                "logprob": token.logprob,
                "top": [{"token_id": token_id, "logprob": value} for token_id, value in token.top],
            }
            for token in sample.logprobs
        ]
    return {
        "generated_text": text,
        "reasoning_text": reasoning,
        "finish_reason": sample.finish_reason,
        "num_generated_tokens": len(sample.token_ids),
        "logprobs": logprobs,
    }


def score_values(row: ScoreRow, task: Task, outputs: Sequence[RequestOutput]) -> dict[str, object]:
    """The results of one scored row from the outputs of its requests. If one request fails, the row fails."""
    counts: dict[str, object] = {"num_input_tokens": sum(output.num_prompt_tokens for output in outputs)}
    failed = next((output.error for output in outputs if output.error is not None), None)
    if failed is not None:
        return counts | {"error": error_value(failed)}
    counts |= {"num_cached_tokens": sum(output.num_cached_tokens for output in outputs), "error": None}
    scores = [output.score for output in outputs if output.score is not None]
    return counts | _SCORED[task](row, scores)


def _choose(row: ScoreRow, scores: Sequence[Score]) -> dict[str, object]:
    logprobs = [score.logprob for score in scores]
    choice = _first_largest(logprobs)
    choice_norm = _first_largest([_per_character(*pair) for pair in zip(logprobs, row.sizes, strict=True)])
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
        "perplexity": math.exp(min(-total.logprob / total.num_tokens, 700.0)),  # exp(710) is more than fp64 holds
    }


_SCORED = {"choose": _choose, "loglikelihood": _loglikelihood, "perplexity": _perplexity}


def _per_character(logprob: float, num_chars: int) -> float:
    """An empty choice has no characters, so it never wins."""
    return logprob / num_chars if num_chars else -math.inf


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: (values[index], -index))
