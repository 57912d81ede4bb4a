"""Rows that make no prompt, and the code of each error."""

from typing import Any

import pytest
from smollm import DATE, code_of, encoder_of, texts_of

from segue.workers.errors import RowErrorCode
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate


@pytest.fixture(scope="module")
def short(smollm: Any) -> PromptEncoder:
    return PromptEncoder(smollm, PromptTemplate(), date=DATE, max_prompt_bytes=200)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": None}, RowErrorCode.NULL_PROMPT),
        ({}, RowErrorCode.NULL_PROMPT),
        ({"messages": None, "prompt": "x"}, RowErrorCode.NULL_PROMPT),
        ({"prompt": " \n\t"}, RowErrorCode.EMPTY_PROMPT),
        (
            {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": " "}]},
            RowErrorCode.EMPTY_PROMPT,
        ),
        ({"prompt": "x" * 201}, RowErrorCode.PROMPT_TOO_LARGE),
        ({"prompt": "é" * 101}, RowErrorCode.PROMPT_TOO_LARGE),
        ({"prompt": "a\ud800"}, RowErrorCode.BAD_UNICODE),
        ({"prompt": ["x"]}, RowErrorCode.BAD_MESSAGES),
        ({"prompt": {"x": 1}}, RowErrorCode.BAD_MESSAGES),
        ({"prompt": b"x"}, RowErrorCode.BAD_MESSAGES),
        ({"messages": "hello"}, RowErrorCode.BAD_MESSAGES),
        ({"messages": []}, RowErrorCode.BAD_MESSAGES),
        ({"messages": ["x"]}, RowErrorCode.BAD_MESSAGES),
        ({"messages": [{"role": "user", "content": "x"}] * 1001}, RowErrorCode.BAD_MESSAGES),
        ({"messages": [{"role": "root", "content": "x"}]}, RowErrorCode.BAD_MESSAGES),
        ({"messages": [{"role": ["user"], "content": "x"}]}, RowErrorCode.BAD_MESSAGES),
        ({"messages": [{"role": "user", "content": None}]}, RowErrorCode.BAD_MESSAGES),
        ({"messages": [{"role": "user", "content": 3}]}, RowErrorCode.BAD_MESSAGES),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, RowErrorCode.BAD_MESSAGES),
        ({"messages": [{"role": "user", "content": ["x"]}]}, RowErrorCode.BAD_MESSAGES),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, RowErrorCode.BAD_MESSAGES),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, RowErrorCode.UNSUPPORTED_CONTENT),
        ({"messages": [{"role": "user", "content": [{"image_url": "x"}]}]}, RowErrorCode.UNSUPPORTED_CONTENT),
    ],
)
def test_row_that_is_no_prompt_is_an_error_of_its_row(
    short: PromptEncoder, row: dict[str, object], code: RowErrorCode
) -> None:
    assert code_of(short, row) == code


def test_prompt_of_just_the_largest_size_is_answered(short: PromptEncoder) -> None:
    assert short.encode({"prompt": "é" * 100})


def test_template_with_blank_columns_is_empty_only_if_all_are(smollm: Any) -> None:
    encoder = encoder_of(smollm, messages=[{"role": "user", "content": "Q: {a} {b}"}])
    assert code_of(encoder, {"a": "", "b": " "}) == RowErrorCode.EMPTY_PROMPT
    assert code_of(encoder, {"a": "x", "b": None}) == RowErrorCode.NULL_PROMPT
    assert encoder.encode({"a": "", "b": False})
    assert encoder_of(smollm, messages=[{"role": "user", "content": "Tell a joke."}]).encode({})


def test_preset_without_an_instruction_is_an_error_of_its_row(smollm: Any) -> None:
    encoder = encoder_of(smollm, format="alpaca")
    assert code_of(encoder, {"instruction": None, "input": "x"}) == RowErrorCode.NULL_PROMPT
    assert code_of(encoder, {"instruction": " ", "input": ""}) == RowErrorCode.EMPTY_PROMPT


def test_nul_and_control_characters_are_data(smollm: Any, chat: PromptEncoder) -> None:
    assert "a\x00\x1b[31m\u202eb" in texts_of(smollm, chat.encode({"prompt": "a\x00\x1b[31m\u202eb"}))[1][0]
