"""Chat templates that cannot be used, or that cannot render a row."""

import pytest
from chat_templates import DATE, TURNS, chat

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate


def test_template_that_raises_is_a_template_error_without_the_rows_text() -> None:
    with pytest.raises(RowError) as caught:
        chat("gemma").encoder.encode({"messages": [TURNS[0], {"role": "user", "content": "secret words"}]})
    assert caught.value.code == RowErrorCode.TEMPLATE_ERROR
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}<|im_start|>{{ m.content[:40] }}<|im_end|>{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.content }}"
        "{% if 'twice' in m.content %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.content if 'twice' not in m.content }}<|im_end|>{% endfor %}",
    ],
    ids=["cuts", "repeats", "drops"],
)
def test_template_that_changes_with_a_rows_text_is_a_template_error(source: str) -> None:
    tokenizer = chat("chatml").tokenizer
    encoder = PromptEncoder(tokenizer, PromptTemplate(chat_template=source), date=DATE)
    with pytest.raises(RowError) as caught:
        encoder.encode({"prompt": "say it twice " * 5})
    assert caught.value.code == RowErrorCode.TEMPLATE_ERROR


@pytest.mark.parametrize(
    "source",
    [
        "no message at all",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{{ nothing.at.all }}",
        "{% if %}",
        "{% for m in messages %}<|im_start|>{{ m.content | length }} {{ m.content }}<|im_end|>{% endfor %}",
    ],
    ids=["drops", "repeats", "raises", "syntax", "counts"],
)
def test_template_that_can_show_no_user_message_is_refused_at_load(source: str) -> None:
    with pytest.raises(ValueError, match="chat template"):
        PromptEncoder(chat("chatml").tokenizer, PromptTemplate(chat_template=source), date=DATE)


def test_template_that_closes_a_message_by_its_text_is_rendered_as_transformers_renders_it() -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.content }}{{ '?' if 'fox' in m.content }}<|im_end|>{% endfor %}"
    case = chat("chatml")
    encoder = PromptEncoder(case.tokenizer, PromptTemplate(chat_template=source), date=DATE)
    texts = [
        (case.text(segment), segment.bidirectional) for segment in encoder.encode({"messages": [*TURNS, TURNS[1]]})
    ]
    assert texts == [
        ("<|im_start|>hello<|im_end|>", True),
        ("<|im_start|>dog<|im_end|>", False),
        ("<|im_start|>fox?<|im_end|>", True),
        ("<|im_start|>dog<|im_end|>", False),
    ]


def test_continue_wants_an_assistant_message_last() -> None:
    with pytest.raises(RowError) as caught:
        chat("chatml", continue_final_message=True).encoder.encode({"messages": TURNS})
    assert caught.value.code == RowErrorCode.BAD_MESSAGES
