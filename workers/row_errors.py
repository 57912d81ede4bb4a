"""Why a row has no answer: a closed list of codes, carried as values in the output, never as a crash.

Knows nothing of models or storage. A message never contains text of the row.
"""

from enum import StrEnum

MAX_MESSAGE_CHARS = 500


class RowErrorCode(StrEnum):
    """Every reason a row may be left unanswered, with its `meaning`: the README's table is made of these."""

    meaning: str

    def __new__(cls, code: str, meaning: str) -> "RowErrorCode":
        member = str.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    NULL_PROMPT = "NULL_PROMPT", "the prompt, or a column its template names, is null"
    EMPTY_PROMPT = "EMPTY_PROMPT", "the prompt is empty or white space only"
    BAD_UTF8 = "BAD_UTF8", "a string column holds bytes that are not UTF-8"
    BAD_UNICODE = "BAD_UNICODE", "the text has a lone surrogate and cannot be encoded"
    BAD_MESSAGES = "BAD_MESSAGES", "a messages column is not a list of role and content, at most a thousand of them"
    UNSUPPORTED_CONTENT = "UNSUPPORTED_CONTENT", "a content part that is not text; nothing is fetched"
    TEMPLATE_ERROR = "TEMPLATE_ERROR", "the chat template raised, or lost or repeated a message"
    BAD_CHOICES = "BAD_CHOICES", "no list of choices, or one that has nothing to score"
    BAD_LABEL = "BAD_LABEL", "the label is none of the row's choices"
    BAD_PARAMS = "BAD_PARAMS", "the row's own sampling parameters are out of range"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG", "as many tokens as the model's context, or `limits.max_model_len`, or more"
    PROMPT_TOO_LARGE = "PROMPT_TOO_LARGE", "more bytes than `limits.max_prompt_bytes`"
    INPUT_CORRUPT = "INPUT_CORRUPT", "a page of the row's row group cannot be decoded"
    ROW_OOM = (
        "ROW_OOM",
        "the row alone does not fit into the KV memory, or takes more than `limits.row_memory_bytes` to prepare",
    )
    NUMERIC_ERROR = "NUMERIC_ERROR", "the model gave NaN or infinite logits"
    WORKER_CRASH = (
        "WORKER_CRASH",
        "the row, alone in it, ended the process that prepared it or, twice, that computed it",
    )
    ROW_TIMEOUT = (
        "ROW_TIMEOUT",
        "alone, more than `limits.row_cpu_s` to prepare or, twice, `workers.step_timeout_s` for a step",
    )


class RowError(Exception):
    """One row cannot be answered; all other rows go on.

    `message` says what was found and what was wanted, without quoting the row.
    """

    def __init__(self, code: RowErrorCode, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message[:MAX_MESSAGE_CHARS]

    def __reduce__(self) -> tuple[type["RowError"], tuple[RowErrorCode, str]]:
        return (RowError, (self.code, self.message))
