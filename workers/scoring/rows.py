"""From a row of a dataset to what is scored of it: a context, and the tokens of its continuations.

Applies `workers/scoring/template.py`. Whatever is wrong with a row raises RowError. Knows rows and text; no model, no
storage.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from segue.attention.segments import Segment, canonical_segments, num_tokens
from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.conversation import check_texts, column_text
from segue.workers.prompts.placeholders import columns_in, fill
from segue.workers.rows.request import ScoringRequest
from segue.workers.scoring.pairs import PairEncoder
from segue.workers.scoring.template import ScoringTemplate
from segue.workers.scoring.windows import rolling_requests

MAX_CHOICES = 10_000
UNLABELLED = -1  # of rows whose label is kept secret, in many datasets
_POSITION = re.compile(r"\s*-?[0-9]{1,9}\s*")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """What a row wants scored. For perplexity the only continuation is the whole text, of any length."""

    context: tuple[Segment, ...]  # canonical
    continuations: tuple[tuple[int, ...], ...]  # token ids, none empty
    sizes: tuple[int, ...] = ()  # characters of each choice; words and bytes of a text
    label: int | None = None  # the right choice


class RowScorer:
    """Reads the rows of one job."""

    def __init__(
        self,
        encoder: PairEncoder,
        task: str,
        scoring: ScoringTemplate,
        *,
        delimiter: str,
        max_bytes: int,
        max_model_len: int,
    ) -> None:
        self._encoder = encoder
        self._task = task
        self._scoring = scoring
        self._delimiter = delimiter
        self._max_bytes = max_bytes
        self._max_model_len = max_model_len

    def read(self, row: Mapping[str, object], mask: str) -> ScoreRow:
        """Raises RowError."""
        if self._task == "choose":
            return self._choices(row, mask)
        if self._task in ("loglikelihood", "finetune"):
            return self._continuation(row, mask)
        return self._text(row)

    def _choices(self, row: Mapping[str, object], mask: str) -> ScoreRow:
        texts = self._choice_texts(row)
        label = _label(row.get(self._scoring.label_column), texts)
        check_texts(texts, from_row=(), max_bytes=self._max_bytes)
        context, tokens = self._encoder.encode_row(row, [self._delimiter + text for text in texts], self._max_model_len)
        empty = [number for number, ids in enumerate(tokens) if not ids]
        if empty:
            raise RowError(RowErrorCode.BAD_CHOICES, f"choice {empty[0]} has no tokens, wanted at least one")
        chain = canonical_segments(context, mask=mask)
        return ScoreRow(chain, tuple(tokens), tuple(map(len, texts)), label)

    def _choice_texts(self, row: Mapping[str, object]) -> list[str]:
        if self._scoring.choices is not None:
            return [_filled(text, row) for text in self._scoring.choices]
        value = row.get(self._scoring.choices_column)
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_CHOICES:
            got = "null" if value is None else f"{len(value)} choices" if isinstance(value, list) else "no list"
            raise RowError(RowErrorCode.BAD_CHOICES, f"want 1 to {MAX_CHOICES:,} choices, got {got}")
        if not all(isinstance(choice, str) for choice in value):
            raise RowError(RowErrorCode.BAD_CHOICES, "a choice is null, wanted a text")
        return value

    def _continuation(self, row: Mapping[str, object], mask: str) -> ScoreRow:
        scoring = self._scoring
        template = scoring.continuation
        text = column_text(row, scoring.continuation_column) if template is None else _filled(template, row)
        check_texts([text], from_row=(), max_bytes=self._max_bytes)
        if self._task == "finetune":
            context, tokens = self._encoder.encode_answer(row, text)
        else:
            context, (tokens,) = self._encoder.encode_row(row, [text], self._max_model_len)
        if not tokens:
            raise RowError(RowErrorCode.EMPTY_PROMPT, "the continuation has no tokens, wanted at least one")
        return ScoreRow(canonical_segments(context, mask=mask), (tokens,))

    def _text(self, row: Mapping[str, object]) -> ScoreRow:
        text, tokens, prefix = self._encoder.encode_row_text(row)
        if not text:
            raise RowError(RowErrorCode.EMPTY_PROMPT, "the text is empty, wanted at least one character")
        sizes = len(_SPACE.split(text)), len(text.encode())
        return ScoreRow((Segment((prefix,), False),), (tokens,), sizes)


def requests_of(row: ScoreRow, task: str, max_model_len: int) -> list[ScoringRequest]:
    """A row's requests to the engine: one for each continuation, or for each window of a text."""
    if task == "perplexity":
        return list(rolling_requests(row.continuations[0], row.context[0].token_ids[0], max_model_len))
    return [ScoringRequest(row.context, tokens) for tokens in row.continuations]


def check_fits(request: ScoringRequest, max_model_len: int, limit: str) -> None:
    """Raises RowError(PROMPT_TOO_LONG) if the request is too long. Nothing is ever cut off."""
    length = num_tokens(request.context) + len(request.continuation)
    if length > max_model_len + 1:
        message = f"context and continuation have {length:,} tokens, wanted at most {max_model_len + 1:,} ({limit})"
        raise RowError(RowErrorCode.PROMPT_TOO_LONG, message)


def _filled(template: str, row: Mapping[str, object]) -> str:
    return fill(template, {column: column_text(row, column) for column in columns_in(template)})


def _label(value: object, choices: Sequence[str]) -> int | None:
    """The position of the right choice; None if the row has no label.

    As lm-evaluation-harness has it, a position may be a text of digits; but a text that is one of the choices is that
    choice. Splits without labels have null, -1 or an empty text in each row.
    """
    if isinstance(value, str):
        if choices.count(value) == 1:
            return choices.index(value)
        value = int(value) if _POSITION.fullmatch(value) else value.strip() or None
    if value is None or value == UNLABELLED:
        return None
    if isinstance(value, str):
        raise RowError(RowErrorCode.BAD_LABEL, "the label must be one of the choices, once, or a position from 0")
    if not isinstance(value, int) or not 0 <= value < len(choices):
        raise RowError(RowErrorCode.BAD_LABEL, f"the label must be a position from 0 to {len(choices) - 1}")
    return int(value)
