"""The columns a job adds to the rows it was given: names, types, and the table of one shard.

The schema depends on the job alone, never on what happened to be answered: a shard of errors has the same one. What
scoring tasks put into theirs is in `pipeline/ledger/scores.py`.
"""

from collections.abc import Sequence

import pyarrow as pa

from segue.workers.errors import RowError
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import CompletionOutput, RequestOutput
from segue.workers.scoring.template import Task

_PROVENANCE, _COUNTS = ("src_path", "src_row"), ("num_input_tokens", "num_cached_tokens")
RESULT_COLUMNS: dict[Task, tuple[str, ...]] = {
    "generate": (
        *_PROVENANCE,
        "generated_text",
        "finish_reason",
        "num_generated_tokens",
        *_COUNTS,
        "logprobs",
        "samples",
        "error",
    ),
    "choose": (
        *_PROVENANCE,
        "choice",
        "choice_norm",
        "choice_logprobs",
        "choice_num_tokens",
        "choice_is_greedy",
        "correct",
        "correct_norm",
        *_COUNTS,
        "error",
    ),
    "loglikelihood": (*_PROVENANCE, "logprob", "num_tokens", "is_greedy", *_COUNTS, "error"),
    "perplexity": (
        *_PROVENANCE,
        "logprob",
        "num_tokens",
        "num_words",
        "num_bytes",
        "perplexity",
        *_COUNTS,
        "error",
    ),
    "finetune": (),  # it has no rows of results
}

ANY_RESULT_COLUMN = frozenset(name for names in RESULT_COLUMNS.values() for name in names)

ERROR_TYPE = pa.struct([("code", pa.string()), ("message", pa.string())])
_TOKEN_LOGPROB = [("token_id", pa.int32()), ("logprob", pa.float32())]
LOGPROBS_TYPE = pa.list_(pa.struct([*_TOKEN_LOGPROB, ("top", pa.list_(pa.struct(_TOKEN_LOGPROB)))]))


def result_schema(passed: pa.Schema, params: SamplingParams, *, has_row_params: bool = False) -> pa.Schema:
    """Passed-through columns first, then provenance and results.

    `logprobs` and `samples` only if the job asks for them, or its rows may (`has_row_params`).
    """
    answer = _answer_fields(params, has_row_params)
    samples = [pa.field("samples", pa.list_(pa.struct(answer)))] if params.n > 1 or has_row_params else []
    return framed_schema(passed, answer, samples)


def framed_schema(passed: pa.Schema, answer: Sequence[pa.Field], last: Sequence[pa.Field] = ()) -> pa.Schema:
    """What every task has around its answer: passed-through columns, provenance, token counts, error."""
    provenance = [pa.field("src_path", pa.string()), pa.field("src_row", pa.int64())]
    counts = [pa.field("num_input_tokens", pa.int32()), pa.field("num_cached_tokens", pa.int32())]
    return pa.schema([*passed, *provenance, *answer, *counts, *last, pa.field("error", ERROR_TYPE)])


def _answer_fields(params: SamplingParams, has_row_params: bool) -> list[pa.Field]:
    fields = [
        pa.field("generated_text", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("num_generated_tokens", pa.int32()),
    ]
    has_logprobs = params.logprobs is not None or has_row_params
    return fields if not has_logprobs else [*fields, pa.field("logprobs", LOGPROBS_TYPE)]


def result_row(output: RequestOutput) -> dict[str, object]:
    """One row's results; the scalar columns are sample 0. An error leaves the answer null."""
    if output.error is not None:
        return {"num_input_tokens": len(output.prompt_token_ids) or None, "error": error_value(output.error)}
    answers = [_answer(sample) for sample in output.outputs]
    return {
        **answers[0],
        "num_input_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "samples": answers,
        "error": None,
    }


def error_value(error: RowError) -> dict[str, str]:
    """As the `error` column holds it."""
    return {"code": str(error.code), "message": error.message}


def result_table(schema: pa.Schema, passed: pa.Table, rows: Sequence[dict[str, object]]) -> pa.Table:
    """The shard: passed-through columns as they are, results from `rows`, in one fixed schema."""
    columns = [
        passed[field.name]
        if field.name in passed.column_names
        else pa.array([row.get(field.name) for row in rows], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _answer(sample: CompletionOutput) -> dict[str, object]:
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
        "generated_text": sample.text,
        "finish_reason": sample.finish_reason,
        "num_generated_tokens": len(sample.token_ids),
        "logprobs": logprobs,
    }
