"""Segments and ids of chats under each template of `chat_templates`."""

import datetime

import pytest
from chat_templates import CHATML, DATE, DATED, KINDS, SYSTEM, TEMPLATES, TURNS, chat, expected_ids, ids_of

from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate

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
    "always": [
        ("<s>", False),
        ("<|turn|>system<|said|>Be kind.<|over|>", True),
        ("<|turn|>user<|said|>hello<|over|>", True),
        ("<|turn|>assistant<|said|>dog<|over|>", False),
        ("<|turn|>user<|said|>fox<|over|>", True),
        ("<|turn|>assistant<|said|>", False),
    ],
    "users_header": [
        ("<|im_start|>system\nBe kind.<|im_end|>", True),
        ("<|im_start|>user\nhello<|im_end|>", True),
        ("<|im_start|>assistant\ndog<|im_end|>", False),
        ("<|im_start|>user\nfox<|im_end|>", True),
        ("<|im_start|>assistant\n", False),
    ],
    "two_openers": [
        ("<s>", False),
        ("Be kind.", True),
        ("<U>hello", True),
        ("<A>dog</s>", False),
        ("<U>fox", True),
        ("<A>", False),
    ],
    "last_ends": [
        ("<|turn|>system<|said|>Be kind.<|over|>", True),
        ("<|turn|>user<|said|>hello<|over|>", True),
        ("<|turn|>assistant<|said|>dog<|over|>", False),
        ("<|turn|>user<|said|>fox<|over|>", True),
        ("<|turn|>assistant<|said|>", False),
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
    for case in (chat("qwen"), chat("agent")):
        assert case.texts(thought) == case.texts(TURNS)


def test_template_kwargs_reach_the_generation_header() -> None:
    texts = chat("qwen", chat_template_kwargs={"enable_thinking": False}).texts(TURNS)
    assert texts[-1] == ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False)


def test_date_of_the_plan_is_printed_whatever_another_encoder_prints() -> None:
    case = chat("dated")
    template = PromptTemplate(chat_template=DATED)
    later = PromptEncoder(case.tokenizer, template, date=datetime.date(2030, 5, 6))
    assert "06 May 2030" in case.text(later.encode({"messages": TURNS})[1])
    assert "03 Feb 2026" in case.text(case.encoder.encode({"messages": TURNS})[1])


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
    [
        (name, start)
        for name in ("chatml", "llama3", "zephyr", "always", "users_header", "two_openers", "last_ends", "agent")
        for start in ("The answer", "It is ", "Paris.\n")
    ]
    + [("llama2", "The answer")],
)
def test_continued_message_ends_where_transformers_ends_it(name: str, start: str) -> None:
    case = chat(name, continue_final_message=True)
    messages = [TURNS[0], {"role": "assistant", "content": start}]
    rendered = case.tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATES[name], continue_final_message=True, tokenize=False
    )
    segments = case.encoder.encode({"messages": messages})
    assert ids_of(segments) == case.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert [segment.bidirectional for segment in segments[-2:]] == [True, False]


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


PARTS = [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "fox"}, {"text": "dog"}]}]


@pytest.mark.parametrize("name", ["lists", "chatml"])
def test_list_of_parts_is_handed_to_templates_that_take_lists_and_joined_for_others(name: str) -> None:
    case = chat(name)
    between = "" if name == "lists" else "\n"
    assert case.texts(PARTS)[1] == (f"<|im_start|>user\nfox{between}dog<|im_end|>\n", True)
    joined = [SYSTEM, {"role": "user", "content": "fox\ndog"}]
    assert case.ids(PARTS) == expected_ids(name, case, PARTS if name == "lists" else joined)


def test_parts_of_a_list_are_segments_when_asked_for() -> None:
    texts = chat("lists", segment_by="part").texts(PARTS)
    assert texts[1:3] == [("<|im_start|>user\nfox", True), ("dog<|im_end|>\n", True)]


def test_list_of_parts_of_the_job_is_handed_over_as_a_list() -> None:
    messages = [{"role": "user", "content": [{"text": "{a}"}, {"text": "{b}"}]}]
    case = chat("lists", messages=messages)
    first = case.encoder.encode({"a": "fox", "b": "dog"})[0]
    assert case.text(first) == "<|im_start|>user\nfoxdog<|im_end|>\n"


def test_borders_are_not_needed_under_the_causal_mask() -> None:
    """What a template writes between two messages may be anything."""
    source = "{% for m in messages %}{{ '[%s]' % m.content }}{% endfor %}"
    case = chat("chatml")
    template = PromptTemplate(chat_template=source)
    messages = [{"role": "assistant", "content": "dog"}, *TURNS]
    encoder = PromptEncoder(case.tokenizer, template, date=DATE, mask="causal")
    (segment,) = encoder.encode({"messages": messages})
    assert case.text(segment) == "[dog][hello][dog][fox]"
