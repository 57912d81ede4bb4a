"""The prompt section of a job: columns into messages, what it reads, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from smollm import DATE, encoder_of, texts_of
from transformers import AutoTokenizer

from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.placeholders import fill, parse_placeholders
from segue.workers.prompts.template import PromptTemplate


def test_messages_template_fills_columns(smollm: Any) -> None:
    encoder = encoder_of(
        smollm,
        messages=[
            {"role": "system", "content": "Answer in {{JSON}}."},
            {"role": "user", "content": [{"text": "{document}"}, {"type": "text", "text": "Question: {my question}"}]},
        ],
    )
    row = {"document": "{question} <|im_end|>", "my question": 7.5, "messages": "not read"}
    assert texts_of(smollm, encoder.encode(row))[:2] == [
        ("<|im_start|>system\nAnswer in {JSON}.<|im_end|>\n", True),
        ("<|im_start|>user\n{question} <|im_end|>\nQuestion: 7.5<|im_end|>\n", True),
    ]


@pytest.mark.parametrize(
    "text",
    ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{0.x}", "{ a}", "a } b", "{a", "{a{b}}", "{__class__.x}", "{a\nb}"],
)
def test_placeholder_that_is_no_plain_column_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="literal brace"):
        parse_placeholders(text)
    with pytest.raises(ValidationError):
        PromptTemplate.model_validate({"messages": [{"role": "user", "content": text}]})


@given(before=st.text(), value=st.text())
def test_placeholder_values_and_escaped_text_come_through_unchanged(before: str, value: str) -> None:
    escaped = before.replace("{", "{{").replace("}", "}}")
    assert fill(escaped + "{a}" + escaped, {"a": value}) == before + value + before


@pytest.mark.parametrize(
    ("template", "available", "required"),
    [
        ({}, ["prompt", "messages"], {"messages"}),
        ({}, ["prompt", "x"], {"prompt"}),
        ({}, ["x"], {"prompt"}),
        ({}, ["conversations"], {"conversations"}),
        ({}, ["conversations", "prompt"], {"prompt"}),
        ({}, ["conversations", "messages"], {"messages"}),
        ({"tools_column": "t", "chat_template_kwargs_column": "k"}, ["x"], {"prompt", "t", "k"}),
        ({"messages": [{"role": "user", "content": "{a}"}], "tools_column": "t"}, [], {"a", "t"}),
        ({"prompt_column": "body"}, ["x"], {"body"}),
        ({"messages": [{"role": "user", "content": "{a} {b} {a}"}]}, ["messages"], {"a", "b"}),
        ({"messages": [{"role": "user", "content": [{"text": "{a}"}, {"text": "{c}"}]}]}, [], {"a", "c"}),
        ({"format": "text"}, [], {"prompt"}),
        ({"format": "text", "prompt_column": "body"}, [], {"body"}),
        ({"format": "text", "text": "Q: {q}\nA:"}, [], {"q"}),
        ({"format": "alpaca"}, ["instruction", "input"], {"instruction", "input"}),
        ({"format": "commonsense", "columns": {"instruction": "i", "input": "x"}}, ["i"], {"i"}),
    ],
)
def test_required_columns_are_what_the_template_reads(
    template: dict[str, object], available: list[str], required: set[str]
) -> None:
    assert PromptTemplate.model_validate(template).required_columns(available) == required


@pytest.mark.parametrize(
    "template",
    [
        {"formats": "chat"},
        {"messages": []},
        {"messages": [{"role": "root", "content": "x"}]},
        {"tools": [{"name": "f"}], "tools_column": "t"},
        {"format": "text", "tools": [{"name": "f"}]},
        {"format": "alpaca", "tools_column": "t"},
        {"format": "text", "chat_template_kwargs_column": "k"},
        {"trusted_columns": ["prompt"]},
        {"chat_template_kwargs": {"tools": []}},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "x", "content_file": "y"}]},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
        {"messages": [{"role": "user", "content": "x"}], "continue_final_message": True},
        {"format": "text", "messages": [{"role": "user", "content": "x"}]},
        {"format": "text", "segment_by": "part"},
        {"format": "alpaca", "text": "{prompt}"},
        {"text": "{prompt}"},
        {"columns": {"instruction": "x"}},
        {"format": "alpaca", "columns": {"output": "x"}},
        {"chat_template_kwargs": {"messages": []}},
        {"continue_final_message": "yes"},
    ],
)
def test_prompt_section_that_makes_no_sense_is_refused(template: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PromptTemplate.model_validate(template)


def test_content_file_is_read_beside_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "triage.md").write_text("Sort {kind}.\n", encoding="utf-8")
    template = PromptTemplate.model_validate(
        {"messages": [{"role": "system", "content_file": "triage.md"}, {"role": "user", "content": "{a}"}]}
    )
    resolved = template.resolve(tmp_path)
    assert [message.content for message in resolved.messages or ()] == ["Sort {kind}.\n", "{a}"]
    assert resolved.required_columns(()) == {"kind", "a"}
    assert resolved.resolve(tmp_path / "elsewhere") == resolved


def test_content_file_that_cannot_be_read_is_named(tmp_path: Path, smollm: Any) -> None:
    template = PromptTemplate.model_validate({"messages": [{"role": "user", "content_file": "lost.md"}]})
    with pytest.raises(ValueError, match=r"lost\.md"):
        template.resolve(tmp_path)
    with pytest.raises(ValueError, match="resolve"):
        PromptEncoder(smollm, template, date=DATE)


def test_tokenizer_without_chat_template_is_refused_for_chat_only(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"prompt\.chat_template"):
        encoder_of(tokenizer)
    assert encoder_of(tokenizer, format="text").encode({"prompt": "x"})


def test_roles_that_a_template_refuses_are_refused_at_load(smollm: Any) -> None:
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + str(smollm.chat_template)
    with pytest.raises(ValueError, match="chat template"):
        encoder_of(
            smollm,
            chat_template=picky,
            messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "{a}"}],
        )
