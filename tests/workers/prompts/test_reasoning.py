"""Reasoning is split from an answer by the markers of the template, whether they are special tokens or not."""

from typing import Any

import pytest
from chat_templates import AGENT, DATE, GENERATE, TURNS, chat

from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.reasoning import ReasoningMarkers, ReasoningSplitter
from segue.workers.prompts.template import PromptTemplate

CHANNELS = (  # reasoning and answer are turns of their own, and all markers are special tokens
    "{% for m in messages %}"
    "{% if m.reasoning_content %}<|turn|>thought<|said|>{{ m.reasoning_content }}<|end|>{% endif %}"
    "<|turn|>{{ m.role }}<|said|>{{ m.content }}<|over|>{% endfor %}" + GENERATE + "<|turn|>{% endif %}"
)
OPENED = AGENT.replace("<|im_start|>assistant\n{% if enable_thinking", "<|im_start|>assistant\n<think>\n{% if enable")


def encoder_of(source: str) -> PromptEncoder:
    return PromptEncoder(chat("chatml").tokenizer, PromptTemplate(chat_template=source), date=DATE)


def split(source: str, answer: str, *, text: str | None = None, messages: Any = TURNS) -> tuple[str | None, str]:
    """What becomes of an answer that the model writes after a chat."""
    encoder = encoder_of(source)
    tokenizer: Any = encoder.tokenizer
    markers = encoder.reasoning_markers
    assert markers is not None
    prompt = [token for segment in encoder.encode({"messages": messages}) for token in segment.token_ids]
    tokens = tokenizer(answer, add_special_tokens=False).input_ids
    shown = tokenizer.decode(tokens, skip_special_tokens=True) if text is None else text
    return ReasoningSplitter(markers, tokenizer).split(prompt, tokens, shown)


@pytest.mark.parametrize(
    ("source", "start", "end"),
    [(AGENT, "<think>", "</think>"), (OPENED, "<think>", "</think>"),
     (CHANNELS, "thought<|said|>", "<|end|><|turn|>assistant<|said|>")],
)  # fmt: skip
def test_markers_are_learned_from_the_template(source: str, start: str, end: str) -> None:
    found = encoder_of(source).reasoning_markers
    assert found is not None
    assert (found.start, found.end) == (start, end)


def test_template_without_reasoning_has_no_markers() -> None:
    assert chat("llama3").encoder.reasoning_markers is None
    assert encoder_of("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}").reasoning_markers == (
        ReasoningMarkers("<think>", "</think>")
    )


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("<think>\nfox?\n</think>\n\nThe dog.", ("fox?", "The dog.")),
        ("\n<think>fox?</think>dog", ("fox?", "dog")),
        ("The dog.", (None, "The dog.")),
        ("The <think> dog </think>.", (None, "The <think> dog </think>.")),
        ("<think>\nfox? and the", ("fox? and the", "")),
        ("<think></think>dog", ("", "dog")),
        ("<think>a</think>b</think>c", ("a", "b</think>c")),
        ("", (None, "")),
    ],
)
def test_answer_that_opens_its_reasoning(answer: str, wanted: tuple[str | None, str]) -> None:
    assert split(AGENT, answer) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("fox?\n</think>\n\nThe dog.", ("fox?", "The dog.")),
        ("fox? and the", ("fox? and the", "")),
        ("<think>fox?</think>dog", ("fox?", "dog")),
        ("", ("", "")),
    ],
)
def test_answer_to_a_header_that_opens_the_reasoning(answer: str, wanted: tuple[str | None, str]) -> None:
    assert split(OPENED, answer) == wanted


def test_reasoning_that_history_left_open_does_not_count() -> None:
    cut = [TURNS[0], {"role": "assistant", "content": "<think>\nfox"}, TURNS[2]]
    assert split(AGENT, "The dog.", messages=cut) == (None, "The dog.")


def test_markers_that_are_special_tokens_and_not_in_the_text() -> None:
    answer = "thought<|said|>fox?<|end|><|turn|>assistant<|said|>The dog."
    assert split(CHANNELS, answer) == ("fox?", "The dog.")
    assert split(CHANNELS, "thought<|said|>fox? and") == ("fox? and", "")
    assert split(CHANNELS, "assistant<|said|>The dog.") == (None, "assistantThe dog.")


def test_text_that_a_stop_string_cut_stays_cut() -> None:
    answer = "<think>fox?</think>The dog. STOP"
    assert split(AGENT, answer, text="<think>fox?</think>The dog. ") == ("fox?", "The dog. ")
    assert split(AGENT, answer, text="<think>fo") == ("fo", "")


def test_split_parts_hold_whole_characters() -> None:
    assert split(AGENT, "<think>你好 👋🏽</think>é 狐") == ("你好 👋🏽", "é 狐")
