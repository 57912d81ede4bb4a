"""Text of rows that looks like control tokens stays text, under every template and kind of tokenizer."""

import re

import pytest
from chat_templates import CHATML, CONTROLS, DATE, KINDS, MARKERS, TEMPLATES, TURNS, chat, ids_of
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate

HARMLESS = "xyz"
PREFIXES = [control[:length] for control in CONTROLS for length in range(1, len(control))]
HOSTILE = st.lists(
    st.sampled_from([*CONTROLS, *PREFIXES, *(control[1:] for control in CONTROLS)])
    | st.sampled_from(["\n", " ", "user\n", "\U000f0010", "\ue000", "\U000f00010\U000f0002", "###", "1", "x"])
    | st.characters(exclude_categories=["Cs"]),
    min_size=1,
    max_size=8,
).map("".join)


@settings(max_examples=100, deadline=None)
@given(
    first=HOSTILE,
    answer=HOSTILE,
    last=HOSTILE,
    name=st.sampled_from(sorted(TEMPLATES)),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_control_tokens_in_row_text_stay_text(first: str, answer: str, last: str, name: str, kind: str) -> None:
    case = chat(name, kind)
    contents = [text if text.strip() else HARMLESS for text in (first, answer, last)]
    while any(marker in contents[1] for marker in MARKERS):  # an assistant may write them: see test_markers.py
        contents[1] = re.sub("|".join(MARKERS), HARMLESS, contents[1])
    messages = [{**turn, "content": text} for turn, text in zip(TURNS, contents, strict=True)]
    harmless = [{**turn, "content": HARMLESS} for turn in TURNS]
    unknown = case.tokenizer.unk_token_id
    known = [token for token in case.controls(messages) if token != unknown]
    assert known == case.controls(harmless)
    texts, plain = case.texts(messages), case.texts(harmless)
    assert [rule for _, rule in texts] == [rule for _, rule in plain]
    if kind == "bytes":
        assert contents[0].strip() in "".join(text for text, _ in texts)


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(HOSTILE, min_size=2, max_size=4))
def test_control_tokens_put_together_from_parts_stay_text(parts: list[str]) -> None:
    case = chat("llama3", segment_by="part")
    contents = [{"text": part + HARMLESS} for part in parts]
    harmless = [{"text": HARMLESS} for _ in parts]
    hostile, plain = ([{"role": "user", "content": content}] for content in (contents, harmless))
    assert case.controls(hostile) == case.controls(plain)
    assert len(case.texts(hostile)) == len(case.texts(plain))


def test_text_of_the_private_characters_themselves_is_safe() -> None:
    every = "".join(map(chr, range(0xF0010, 0xFFFF0))) + "<|im_end|>"
    assert len(chat("chatml").texts([{"role": "user", "content": every}])) == 2
    with pytest.raises(RowError) as caught:
        chat("chatml").texts([{"role": "user", "content": "".join(map(chr, range(0xF0000, 0x100000)))}])
    assert caught.value.code == RowErrorCode.TEMPLATE_ERROR


def test_template_that_ends_a_control_token_after_a_content_cannot_be_abused() -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.content }}|>{% endfor %}"
    encoder = PromptEncoder(chat("chatml").tokenizer, PromptTemplate(chat_template=source), date=DATE)
    tokenizer = chat("chatml").tokenizer
    (segment, *_) = encoder.encode({"prompt": "hello <|im_end"})
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in segment.token_ids
    assert "hello <|im_end|>" in tokenizer.decode(segment.token_ids)


def test_template_that_begins_a_control_token_before_a_content_cannot_be_abused() -> None:
    source = "{% for m in messages %}<|im_start|>user\n<|im_end{{ m.content }}<|im_end|>{% endfor %}"
    encoder = PromptEncoder(chat("chatml").tokenizer, PromptTemplate(chat_template=source), date=DATE)
    token = chat("chatml").tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids_of(encoder.encode({"prompt": "|>hello"})).count(token) == 1


def test_template_that_looks_for_a_special_token_in_a_content_sees_it_and_it_stays_text() -> None:
    source = CHATML.replace("{{ m.content }}", "{{ m.content.split('<|end|>')[-1] }}{{ '!' if '</s>' in m.content }}")
    case = chat("chatml")
    encoder = PromptEncoder(case.tokenizer, PromptTemplate(chat_template=source), date=DATE)
    messages = [TURNS[0], {"role": "assistant", "content": "fox<|end|>dog</s>"}, TURNS[2]]
    segments = encoder.encode({"messages": messages})
    assert case.text(segments[1]) == "<|im_start|>assistant\ndog</s>!<|im_end|>\n"
    assert case.tokenizer.eos_token_id not in segments[1].token_ids
