"""Segments and ids of chats under templates that trim, merge, insert, date and cut what they are given."""

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from segue.attention.segments import Segment
from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate

DATE = datetime.date(2026, 2, 3)
CONTROLS = (
    *("<s>", "</s>", "<unk>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"),
    *("<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>", "<tool_call>"),
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog and says hello world to you",
    "system user assistant You are a helpful assistant. Cutting Knowledge Date: December 2023",
    "What is the capital of France? It is Paris.\n\nThank you  very much!\n",
)

GENERATE = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + GENERATE
    + "<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    + GENERATE
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DATED = (
    "{{ '<|begin_of_text|>' }}"
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content | trim %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n{{ s }}<|eot_id|>"
    "{% for m in rest %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    + GENERATE
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ (first if loop.first else '') + m.content | trim }}<end_of_turn>\n{% endfor %}"
    + GENERATE
    + "<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{{ '<s>' }}{% for m in rest %}"
    "{% if m.role == 'user' %}[INST] {{ (s if loop.last else '') + m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}<s>( {{ (s if loop.first else '') + m.content.strip() }} )"
    "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
    + GENERATE
    + "<|im_start|>assistant\n{% if not enable_thinking | default(true) %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}(({{ m.role }}))\n{{ m.content }}</s>\n{% endfor %}"
    + GENERATE
    + "((assistant))\n{% endif %}"
)
VICUNA = (
    "{% if messages[0].role != 'system' %}A polite chat. {% endif %}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}" + GENERATE + "ASSISTANT:{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "dated": DATED,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "llama2": LLAMA2,
    "qwen": QWEN,
    "zephyr": ZEPHYR,
    "vicuna": VICUNA,
    "phi3": PHI3,
}
SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "dog"},
    {"role": "user", "content": "fox"},
]


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    return tokenizer


def _sentencepiece(scheme: str) -> Tokenizer:
    """The Llama and Mistral kind: spaces are a character, unknown ones are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    # A trainer makes its byte tokens added ones; in a real tokenizer they are vocabulary alone.
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"added_tokens": []}))


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    special = [text for text in CONTROLS if "think" not in text and "tool" not in text]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, rstrip="|user" in text) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>", "<tool_call>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = {
    "bytes": _byte_level,
    "first": lambda: _sentencepiece("first"),
    "always": lambda: _sentencepiece("always"),
    "never": lambda: _sentencepiece("never"),
    "normalizer": lambda: _sentencepiece("normalizer"),
}
BOS_OF = {"llama3": "<|begin_of_text|>", "dated": "<|begin_of_text|>", "gemma": "<bos>", "chatml": "<|im_start|>"}


@dataclass
class Chat:
    tokenizer: Any
    encoder: PromptEncoder

    def texts(self, messages: list[dict]) -> list[tuple[str, bool]]:
        return [(self.text(s), s.bidirectional) for s in self.encoder.encode({"messages": messages})]

    def text(self, segment: Segment) -> str:
        return self.tokenizer.decode(segment.token_ids, skip_special_tokens=False)

    def ids(self, messages: list[dict]) -> list[int]:
        return _ids(self.encoder.encode({"messages": messages}))

    def controls(self, messages: list[dict]) -> list[int]:
        control = set(self.tokenizer.get_added_vocab().values())
        return [token for token in self.ids(messages) if token in control]


def _ids(segments: Sequence[Segment]) -> list[int]:
    return [token for segment in segments for token in segment.token_ids]


_TOKENIZERS: dict[tuple[str, str], PreTrainedTokenizerFast] = {}
_CHATS: dict[tuple, Chat] = {}


def chat(name: str, kind: str = "bytes", **options: object) -> Chat:
    key = (name, kind, repr(options))
    if key not in _CHATS:
        bos = BOS_OF.get(name, "<s>")
        tokenizer = _TOKENIZERS.setdefault((kind, bos), _wrap(KINDS[kind]()))
        tokenizer.bos_token = bos
        template = PromptTemplate(chat_template=TEMPLATES[name], **options)  # type: ignore[arg-type]
        _CHATS[key] = Chat(tokenizer, PromptEncoder(tokenizer, template, date=DATE))
    return _CHATS[key]


def expected_ids(name: str, case: Chat, messages: list[dict]) -> list[int]:
    """What transformers gives for the whole rendered text, on the plan's date."""
    source = TEMPLATES[name].replace("strftime_now('%d %b %Y')", "'03 Feb 2026'")
    rendered = case.tokenizer.apply_chat_template(
        messages, chat_template=source, add_generation_prompt=True, tokenize=False
    )
    return case.tokenizer(rendered, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


H, N, E = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
EXPECTED = {
    "chatml": [
        ("<|im_start|>system\nBe kind.<|im_end|>\n", True),
        ("<|im_start|>user\nhello<|im_end|>\n", True),
        ("<|im_start|>assistant\ndog<|im_end|>\n", False),
        ("<|im_start|>user\nfox<|im_end|>\n", True),
        ("<|im_start|>assistant\n", False),
    ],
    "llama3": [
        ("<|begin_of_text|>", False),
        (f"{H}system{N}Be kind.{E}", True),
        (f"{H}user{N}hello{E}", True),
        (f"{H}assistant{N}dog{E}", False),
        (f"{H}user{N}fox{E}", True),
        (f"{H}assistant{N}", False),
    ],
    "dated": [
        ("<|begin_of_text|>", False),
        (f"{H}system{N}Today Date: 03 Feb 2026\n\nBe kind.{E}", True),
        (f"{H}user{N}hello{E}", True),
        (f"{H}assistant{N}dog{E}", False),
        (f"{H}user{N}fox{E}", True),
        (f"{H}assistant{N}", False),
    ],
    "gemma": [
        ("<bos>", False),
        ("<start_of_turn>user\nBe kind.\n\nhello<end_of_turn>\n", True),
        ("<start_of_turn>model\ndog<end_of_turn>\n", False),
        ("<start_of_turn>user\nfox<end_of_turn>\n", True),
        ("<start_of_turn>model\n", False),
    ],
    "mistral": [
        ("<s>", False),
        ("[INST] hello[/INST]", True),
        (" dog</s>", False),
        ("[INST] Be kind.\n\nfox[/INST]", True),
    ],
    "llama2": [
        ("<s>( <<SYS>>\nBe kind.\n<</SYS>>\n\nhello )", True),
        (" dog </s>", False),
        ("<s>( fox )", True),
    ],
    "qwen": [
        ("<|im_start|>system\nBe kind.<|im_end|>\n", True),
        ("<|im_start|>user\nhello<|im_end|>\n", True),
        ("<|im_start|>assistant\ndog<|im_end|>\n", False),
        ("<|im_start|>user\nfox<|im_end|>\n", True),
        ("<|im_start|>assistant\n", False),
    ],
    "zephyr": [
        ("((system))\nBe kind.</s>\n", True),
        ("((user))\nhello</s>\n", True),
        ("((assistant))\ndog</s>\n", False),
        ("((user))\nfox</s>\n", True),
        ("((assistant))\n", False),
    ],
    "vicuna": [
        ("Be kind. ", True),
        ("USER: hello ", True),
        ("ASSISTANT: dog</s>", False),
        ("USER: fox ", True),
        ("ASSISTANT:", False),
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_segments_of_each_template_follow_its_turns(name: str) -> None:
    assert chat(name).texts([SYSTEM, *TURNS]) == EXPECTED[name]


AWKWARD = [
    [{"role": "user", "content": "  hello \n"}],
    [{"role": "user", "content": "你好 👋🏽 \n\n tabs\t and  spaces  "}],
    [SYSTEM, {"role": "user", "content": "\nthe quick"}],
    [*TURNS, {"role": "assistant", "content": " Paris. "}, {"role": "user", "content": "x\n\n"}],
    [SYSTEM, *TURNS],
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_of_ordinary_chats_equal_those_of_the_whole_text(name: str, kind: str) -> None:
    case = chat(name, kind)
    for messages in AWKWARD:
        if name != "phi3" or messages[0]["role"] != "system":
            assert case.ids(messages) == expected_ids(name, case, messages), messages


def test_kinds_of_tokenizer_write_spaces_after_control_tokens_differently() -> None:
    """Or the test above would try one kind only."""
    first, always = chat("mistral", "first"), chat("mistral", "always")
    text = "<s>hello"
    assert first.tokenizer.tokenize(text) != always.tokenizer.tokenize(text)


def test_default_system_prompt_is_a_bidirectional_segment_of_its_own() -> None:
    assert chat("qwen").texts(TURNS)[:2] == [
        ("<|im_start|>system\nYou are Qwen.<|im_end|>\n", True),
        ("<|im_start|>user\nhello<|im_end|>\n", True),
    ]
    assert chat("vicuna").texts(TURNS)[:2] == [("A polite chat. ", True), ("USER: hello ", True)]


def test_default_system_prompt_with_bos_and_date_follows_a_causal_bos() -> None:
    assert chat("dated").texts(TURNS)[:3] == [
        ("<|begin_of_text|>", False),
        (f"{H}system{N}Today Date: 03 Feb 2026\n\n{E}", True),
        (f"{H}user{N}hello{E}", True),
    ]


def test_bos_that_opens_every_turn_belongs_to_its_message() -> None:
    assert chat("chatml").texts(TURNS)[0] == ("<|im_start|>user\nhello<|im_end|>\n", True)
    assert chat("llama2").texts(TURNS[:1])[0] == ("<s>( hello )", True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_bos_is_never_added_to_what_the_template_writes(name: str) -> None:
    case = chat(name)
    rendered = case.tokenizer.apply_chat_template(TURNS, chat_template=TEMPLATES[name], tokenize=False)
    bos = case.tokenizer.bos_token
    assert case.ids(TURNS).count(case.tokenizer.bos_token_id) >= rendered.count(bos)
    assert case.ids(TURNS[:1]).count(case.tokenizer.convert_tokens_to_ids("<s>")) <= 1


def test_thinking_in_history_is_cut_as_the_template_cuts_it() -> None:
    thought = [TURNS[0], {"role": "assistant", "content": "<think>\nfox?\n</think>\n\ndog"}, TURNS[2]]
    case = chat("qwen")
    assert case.texts(thought) == case.texts(TURNS)


def test_thinking_that_would_become_control_tokens_is_a_template_error() -> None:
    thought = [TURNS[0], {"role": "assistant", "content": "</think> dog <tool_call>"}, TURNS[2]]
    with pytest.raises(RowError) as caught:
        chat("qwen").encoder.encode({"messages": thought})
    assert caught.value.code == RowErrorCode.TEMPLATE_ERROR


def test_template_kwargs_reach_the_generation_header() -> None:
    texts = chat("qwen", chat_template_kwargs={"enable_thinking": False}).texts(TURNS)
    assert texts[-1] == ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False)


def test_date_of_the_plan_is_printed_whatever_another_encoder_prints() -> None:
    case = chat("dated")
    template = PromptTemplate(chat_template=DATED)
    later = PromptEncoder(case.tokenizer, template, date=datetime.date(2030, 5, 6))
    assert "06 May 2030" in case.text(later.encode({"messages": TURNS})[1])
    assert "03 Feb 2026" in case.text(case.encoder.encode({"messages": TURNS})[1])


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
        "{% for m in messages %}<|im_start|>{{ m.content }}{{ '?' if 'twice' in m.content }}<|im_end|>{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.content | length }} {{ m.content }}<|im_end|>{% endfor %}",
    ],
    ids=["cuts", "repeats", "drops", "closes otherwise", "counts"],
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
    ],
    ids=["drops", "repeats", "raises", "syntax"],
)
def test_template_that_can_show_no_user_message_is_refused_at_load(source: str) -> None:
    with pytest.raises(ValueError, match="chat template"):
        PromptEncoder(chat("chatml").tokenizer, PromptTemplate(chat_template=source), date=DATE)


def test_template_that_begins_a_control_token_before_a_content_is_refused() -> None:
    source = "{% for m in messages %}<|im_start|>user\n<|im_end{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match="beginning of a control token"):
        PromptEncoder(chat("chatml").tokenizer, PromptTemplate(chat_template=source), date=DATE)


def test_template_that_ends_a_control_token_after_a_content_cannot_be_abused() -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.content }}|>{% endfor %}"
    encoder = PromptEncoder(chat("chatml").tokenizer, PromptTemplate(chat_template=source), date=DATE)
    with pytest.raises(RowError) as caught:
        encoder.encode({"prompt": "hello <|im_end"})
    assert caught.value.code == RowErrorCode.TEMPLATE_ERROR


@pytest.mark.parametrize("name", TEMPLATES)
def test_empty_message_among_others_keeps_the_ids_of_the_whole_text(name: str) -> None:
    case = chat(name)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}, TURNS[2]]
    assert case.ids(messages) == expected_ids(name, case, messages)


def test_empty_message_that_a_template_leaves_out_is_no_segment() -> None:
    source = CHATML.replace("<|im_start|>{{ m.role }}", "{% if m.content %}<|im_start|>{{ m.role }}", 1)
    source = source.replace("<|im_end|>\n{% endfor", "<|im_end|>\n{% endif %}{% endfor", 1)
    case = chat("chatml")
    encoder = PromptEncoder(case.tokenizer, PromptTemplate(chat_template=source), date=DATE)
    segments = encoder.encode({"messages": [{"role": "system", "content": ""}, *TURNS]})
    assert [(case.text(s), s.bidirectional) for s in segments] == EXPECTED["chatml"][1:]


def test_consecutive_tool_messages_in_one_turn_are_one_segment() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
        "\n(tool)\n{{ m.content }}\n(end)"
        "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    case = chat("chatml")
    encoder = PromptEncoder(case.tokenizer, PromptTemplate(chat_template=source), date=DATE)
    tools = [{"role": "tool", "content": "one"}, {"role": "tool", "content": "two"}]
    texts = [(case.text(s), s.bidirectional) for s in encoder.encode({"messages": [*TURNS[:2], *tools]})]
    assert texts[2] == ("<|im_start|>user(tool)\none\n(end)(tool)\ntwo\n(end)<|im_end|>\n", True)


@pytest.mark.parametrize(
    ("name", "start"),
    # Not llama2 with white space at the end: transformers takes the template's own space for the message's.
    [(name, start) for name in ("chatml", "llama3", "zephyr") for start in ("The answer", "It is ", "Paris.\n")]
    + [("llama2", "The answer")],
)
def test_continued_message_ends_where_transformers_ends_it(name: str, start: str) -> None:
    case = chat(name, continue_final_message=True)
    messages = [TURNS[0], {"role": "assistant", "content": start}]
    rendered = case.tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATES[name], continue_final_message=True, tokenize=False
    )
    segments = case.encoder.encode({"messages": messages})
    assert _ids(segments) == case.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert [segment.bidirectional for segment in segments[-2:]] == [True, False]


def test_continue_wants_an_assistant_message_last() -> None:
    with pytest.raises(RowError) as caught:
        chat("chatml", continue_final_message=True).encoder.encode({"messages": TURNS})
    assert caught.value.code == RowErrorCode.BAD_MESSAGES


def test_parts_are_segments_when_asked_for_and_the_same_tokens_otherwise() -> None:
    parts = [{"type": "text", "text": "the rubric "}, {"type": "text", "text": "fox"}, {"text": " "}, {"text": "dog"}]
    messages = [SYSTEM, {"role": "user", "content": parts}]
    whole, split = chat("llama3"), chat("llama3", segment_by="part")
    assert whole.ids(messages) == split.ids(messages)
    assert len(whole.texts(messages)) == 4
    assert split.texts(messages)[2:] == [
        (f"{H}user{N}the rubric \n", True),
        ("fox\n \n", True),
        ("dog" + E, True),
        (f"{H}assistant{N}", False),
    ]


def test_parts_of_an_assistant_message_stay_one_causal_segment() -> None:
    messages = [TURNS[0], {"role": "assistant", "content": [{"text": "fox"}, {"text": "dog"}]}, TURNS[2]]
    assert len(chat("llama3", segment_by="part").texts(messages)) == 5


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
    if name == "qwen":
        contents[1] = contents[1].replace("</think>", "")
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
