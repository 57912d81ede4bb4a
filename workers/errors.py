"""Why a row has no answer, and why a model cannot be used.

The reasons for rows are a closed list of codes. They are values in the output and never end a worker. A message never
contains text of the row. Knows nothing of models or storage.
"""

from enum import StrEnum

MAX_MESSAGE_CHARS = 500


class RowErrorCode(StrEnum):
    """Every reason why a row has no answer, with its `meaning` and a `remedy`. The pages for users show both."""

    meaning: str
    remedy: str

    def __new__(cls, code: str, meaning: str, remedy: str) -> "RowErrorCode":
        member = str.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        member.remedy = remedy
        return member

    NULL_PROMPT = (
        "NULL_PROMPT",
        "the prompt, or a column its template names, is null",
        "fill the column, or say what stands for null in the template's text",
    )
    EMPTY_PROMPT = (
        "EMPTY_PROMPT",
        "the prompt is empty or white space only, or a continuation has no tokens",
        "leave such rows out with `input.filters`",
    )
    BAD_UTF8 = (
        "BAD_UTF8",
        "a string column holds bytes that are not UTF-8",
        "write the file anew from its source with the right encoding",
    )
    BAD_UNICODE = (
        "BAD_UNICODE",
        "the text has a lone surrogate and cannot be encoded",
        "write the file anew: a text was cut inside a character",
    )
    BAD_MESSAGES = (
        "BAD_MESSAGES",
        "messages that are no list of role and content, at most a thousand, or wrong tools or template arguments",
        "bring the column into OpenAI's form, or ShareGPT's",
    )
    BAD_PROMPT = (
        "BAD_PROMPT",
        "only in process: a prompt that is neither text, chat nor token ids, or has ids that the model does not have",
        "give text, messages, or token ids below the model's `vocab_size`",
    )
    UNSUPPORTED_CONTENT = (
        "UNSUPPORTED_CONTENT",
        "a content part that is not text; nothing is fetched",
        "turn pictures and files into text before",
    )
    TEMPLATE_ERROR = (
        "TEMPLATE_ERROR",
        "the chat template raised, or lost or repeated a message",
        "look at the order of roles, or set `prompt.chat_template`",
    )
    BAD_CHOICES = "BAD_CHOICES", "no list of choices, or one that has nothing to score", "fill the column of choices"
    BAD_LABEL = (
        "BAD_LABEL",
        "the label is none of the row's choices",
        "a label is the text of one of the choices, or a position from 0; null, -1 and empty texts are no label",
    )
    BAD_PARAMS = (
        "BAD_PARAMS",
        "the row's own sampling parameters are out of range, or its form is none that this model can write",
        "correct the row's `sampling_params`, or the job's `sampling_params.structured_outputs`",
    )
    PROMPT_TOO_LONG = (
        "PROMPT_TOO_LONG",
        "as many tokens as the model's context, or `limits.max_model_len`, or more",
        "`segue retry OUT --output OUT2 --set limits.max_model_len=N`, or a model with a longer context",
    )
    PROMPT_TOO_LARGE = (
        "PROMPT_TOO_LARGE",
        "more bytes than `limits.max_prompt_bytes`",
        "`segue retry OUT --output OUT2 --set limits.max_prompt_bytes=N`",
    )
    INPUT_CORRUPT = (
        "INPUT_CORRUPT",
        "a page of the row's row group cannot be decoded",
        "copy the file again from its source; it is then another dataset, and another output folder",
    )
    ROW_OOM = (
        "ROW_OOM",
        "the row alone does not fit into the KV memory, or takes more than `limits.row_memory_bytes` to prepare",
        "`segue retry OUT --output OUT2 --set workers.kv_cache_memory_bytes=N`, or what its message names",
    )
    NUMERIC_ERROR = (
        "NUMERIC_ERROR",
        "the model gave NaN or infinite logits",
        "`segue retry OUT --output OUT2 --set model.dtype=float32`, or bfloat16 for float16",
    )
    WORKER_CRASH = (
        "WORKER_CRASH",
        "the row, alone in it, ended the process that prepared it or, twice, that computed it",
        "look at the row by `src_path` and `src_row`; tell us if a library crashed",
    )
    ROW_TIMEOUT = (
        "ROW_TIMEOUT",
        "alone, more than `limits.row_cpu_s` to prepare or, twice, `workers.step_timeout_s` for a step",
        "`segue retry OUT --output OUT2 --set limits.row_cpu_s=N`, or `workers.step_timeout_s`",
    )


class RowError(Exception):
    """One row cannot be answered; all other rows go on.

    `message` says what was found and what was wanted. It never quotes the row.
    """

    def __init__(self, code: RowErrorCode, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message[:MAX_MESSAGE_CHARS]

    def __reduce__(self) -> tuple[type["RowError"], tuple[RowErrorCode, str]]:
        return (RowError, (self.code, self.message))


class ModelRefused(ValueError):
    """The model cannot be used. The message says why: what was found and what is wanted."""
