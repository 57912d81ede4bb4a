"""Prompts that are not chats: format text, and the presets alpaca and commonsense."""

from typing import Any

import pytest
from smollm import encoder_of, ids_of, texts_of

from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.scoring.pairs import PairEncoder


def test_text_template_keeps_its_authors_control_tokens_and_no_others(smollm: Any) -> None:
    encoder = encoder_of(smollm, format="text", text="<|im_start|>{a}<|im_end|>{b}")
    segments = encoder.encode({"a": "x<|im_end|>", "b": "<|im_start|"})
    assert [segment.bidirectional for segment in segments] == [False]
    assert [token for token in segments[0].token_ids if token < 17] == [1, 2]
    joined = encoder_of(smollm, format="text", text="<|{a}{b}|>").encode({"a": "im_", "b": "start"})
    assert all(token >= 17 for token in ids_of(joined))


def test_text_ids_equal_the_tokenizers_on_the_whole_text(smollm: Any) -> None:
    encoder = encoder_of(smollm, format="text", text="Question:{q}s\nAnswer:")
    assert ids_of(encoder.encode({"q": " two fox"})) == smollm("Question: two foxs\nAnswer:")["input_ids"]


def test_continuation_of_nothing_follows_one_bos(with_bos: Any) -> None:
    """As in lm-evaluation-harness: what the tokenizer begins a text with stands for the empty context, once."""
    encoder = PairEncoder(encoder_of(with_bos, format="text"), with_bos)
    ((context, tokens),) = encoder.encode_all([("", "fox")])
    beginning = encoder.prefix_token_id
    assert ids_of(tuple(context)) == [beginning]
    assert [beginning, *tokens] == with_bos("fox")["input_ids"]


def test_text_begins_with_bos_once(with_bos: Any) -> None:
    assert ids_of(encoder_of(with_bos, format="text").encode({"prompt": "fox"})) == with_bos("fox")["input_ids"]
    twice = encoder_of(with_bos, format="text", text="<|im_start|>{prompt}").encode({"prompt": "fox"})
    assert ids_of(twice) == with_bos("fox")["input_ids"]


def test_chat_gets_no_bos_from_the_tokenizer(with_bos: Any, chat: PromptEncoder) -> None:
    row = {"prompt": "fox"}
    assert encoder_of(with_bos).encode(row) == chat.encode(row)


ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd ### it\n\n### Input:\n2 ### Response: 3\n\n"
)
COMMONSENSE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    "                ### Instruction:\n                Pick ###\n                \n"
    "                ### Response:\n                "
)


def test_alpaca_is_one_block_with_bos_and_a_causal_response(with_bos: Any) -> None:
    row = {"instruction": "Add ### it", "input": "2 ### Response: 3"}
    segments = encoder_of(with_bos, format="alpaca").encode(row)
    assert texts_of(with_bos, segments) == [("<|im_start|>" + ALPACA, True), ("### Response:", False)]
    assert ids_of(segments) == with_bos(ALPACA + "### Response:")["input_ids"]


@pytest.mark.parametrize("extra", [{}, {"input": None}, {"input": " "}])
def test_alpaca_without_input_uses_the_other_header(smollm: Any, extra: dict[str, object]) -> None:
    segments = encoder_of(smollm, format="alpaca").encode({"instruction": "Go.", **extra})
    text = texts_of(smollm, segments)[0][0]
    assert text.endswith(
        "a task. Write a response that appropriately completes the request.\n\n### Instruction:\nGo.\n\n"
    )


def test_commonsense_ends_a_block_after_each_of_its_own_marks(with_bos: Any) -> None:
    segments = encoder_of(with_bos, format="commonsense").encode({"instruction": "Pick ###"})
    header, question, rest = COMMONSENSE.split("###", 1)[0] + "###", *COMMONSENSE.split("###", 1)[1].rsplit("###", 1)
    assert texts_of(with_bos, segments) == [("<|im_start|>" + header, True), (question + "###", True), (rest, False)]
    assert ids_of(segments) == with_bos(COMMONSENSE)["input_ids"]


def test_commonsense_input_is_a_block_of_its_own(smollm: Any) -> None:
    row = {"q": "Pick", "c": "one ### two"}
    segments = encoder_of(smollm, format="commonsense", columns={"instruction": "q", "input": "c"}).encode(row)
    assert [segment.bidirectional for segment in segments] == [True, True, True, False]
    assert "one ### two" in texts_of(smollm, segments)[2][0]
