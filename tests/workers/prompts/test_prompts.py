"""Chats in SmolLM2's own tokenizer and template: segments, ids, and text that looks like control tokens."""

import pickle
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from smollm import DATE, encoder_of, ids_of, texts_of

from segue.attention.segments import Segment
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate

DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def test_smollm_prompt_column_is_a_user_message_after_the_default_system_prompt(
    smollm: Any, chat: PromptEncoder
) -> None:
    assert texts_of(smollm, chat.encode({"prompt": "Name a colour."})) == [
        (DEFAULT_SYSTEM, True),
        ("<|im_start|>user\nName a colour.<|im_end|>\n", True),
        ("<|im_start|>assistant\n", False),
    ]


def test_smollm_messages_column_is_used_as_it_is(smollm: Any, chat: PromptEncoder) -> None:
    messages = [
        {"role": "system", "content": "Be kind. "},
        {"role": "user", "content": [{"type": "text", "text": " Hi"}, {"type": "text", "text": "there\n"}]},
        {"role": "assistant", "content": "Hello!", "name": None},
        {"role": "user", "content": "你好 👋🏽"},
    ]
    assert texts_of(smollm, chat.encode({"prompt": "not read", "messages": messages})) == [
        ("<|im_start|>system\nBe kind. <|im_end|>\n", True),
        ("<|im_start|>user\n Hi\nthere\n<|im_end|>\n", True),
        ("<|im_start|>assistant\nHello!<|im_end|>\n", False),
        ("<|im_start|>user\n你好 👋🏽<|im_end|>\n", True),
        ("<|im_start|>assistant\n", False),
    ]


WORDS = st.text(st.characters(exclude_categories=["Cs", "Co"]) | st.sampled_from(" \n\t.'0"), min_size=1)


@settings(max_examples=150, deadline=None)
@given(contents=st.lists(WORDS, min_size=1, max_size=4))
def test_smollm_ids_of_ordinary_rows_equal_the_tokenizers_own(
    smollm: Any, chat: PromptEncoder, contents: list[str]
) -> None:
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, [*contents, "end"], strict=False)]
    if not any(text.strip() for text in contents):
        return
    rendered = smollm.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ids_of(chat.encode({"messages": messages})) == smollm(rendered, add_special_tokens=False)["input_ids"]


def _fragments(tokenizer: Any) -> list[str]:
    controls = list(tokenizer.get_added_vocab())
    pieces = [control[:length] for control in controls for length in range(1, len(control) + 1)]
    return [*pieces, *(control[1:] for control in controls), "system\n", "user\n", "\n", " "]


@settings(max_examples=200, deadline=None)
@given(pieces=st.data())
def test_smollm_control_tokens_in_rows_stay_text(smollm: Any, chat: PromptEncoder, pieces: st.DataObject) -> None:
    text = st.lists(st.sampled_from(_fragments(smollm)), min_size=1, max_size=6).map("".join)
    contents = [pieces.draw(text) + "x" for _ in range(3)]
    roles = ["system", "user", "assistant"]
    hostile = chat.encode({"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]})
    benign = chat.encode({"messages": [{"role": r, "content": "x"} for r in roles]})
    control = set(smollm.get_added_vocab().values())
    assert [[t for t in s.token_ids if t in control] for s in hostile] == [
        [t for t in s.token_ids if t in control] for s in benign
    ]
    assert [s.bidirectional for s in hostile] == [s.bidirectional for s in benign]
    for segment, content in zip(hostile, contents, strict=False):
        assert content in str(smollm.decode(segment.token_ids))


def test_smollm_parts_share_the_ids_of_the_whole_message(smollm: Any, chat: PromptEncoder) -> None:
    content = [{"text": "A document. "}, {"text": "A question?"}]
    row = {"messages": [{"role": "user", "content": content}]}
    split = encoder_of(smollm, segment_by="part").encode(row)
    assert ids_of(split) == ids_of(chat.encode(row))
    assert texts_of(smollm, split)[1:3] == [
        ("<|im_start|>user\nA document. \n", True),
        ("A question?<|im_end|>\n", True),
    ]


def test_encoder_made_from_a_directory_survives_a_pickle(directory: Path, chat: PromptEncoder) -> None:
    encoder = PromptEncoder.from_directory(directory, PromptTemplate(), date=DATE)
    pickled = pickle.dumps(encoder)
    assert len(pickled) < 2000
    row = {"prompt": "Hi <|im_end|>"}
    assert pickle.loads(pickled).encode(row) == chat.encode(row)


def test_encode_prompt_of_a_string_is_one_causal_segment_of_plain_text(smollm: Any, chat: PromptEncoder) -> None:
    assert chat.encode_prompt("Once upon a time") == (Segment(tuple(smollm("Once upon a time")["input_ids"]), False),)
    assert 1 not in ids_of(chat.encode_prompt("<|im_start|>"))


def test_encode_prompt_of_messages_is_a_chat(smollm: Any, chat: PromptEncoder) -> None:
    segments = chat.encode_prompt([{"role": "user", "content": "Hi"}])
    assert segments == chat.encode({"prompt": "Hi"})
    assert encoder_of(smollm, format="text").encode_prompt([{"role": "user", "content": "Hi"}]) == segments
