"""Markers such as `<think>` that an assistant or the job writes keep their ids; in all other text they are text."""

import itertools

import pytest
from chat_templates import CONTROLS, DATE, MARKERS, TURNS, chat, expected_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm import ids_of

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate

THOUGHT = "<think>\nfox?\n</think>\n\ndog"
SPECIAL = [text for text in CONTROLS if text not in MARKERS]


def marker_ids(name: str, text: str) -> list[int]:
    tokenizer = chat(name).tokenizer
    return [tokenizer.convert_tokens_to_ids(marker) for marker in MARKERS if marker in text]


@pytest.mark.parametrize("name", ["chatml", "llama3", "zephyr", "always"])
def test_thinking_of_an_assistant_keeps_its_ids(name: str) -> None:
    case = chat(name)
    messages = [TURNS[0], {"role": "assistant", "content": THOUGHT}, TURNS[2]]
    assert case.ids(messages) == expected_ids(name, case, messages)
    assert set(marker_ids(name, THOUGHT)) <= set(case.ids(messages))


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_thinking_of_others_is_text(role: str) -> None:
    case = chat("chatml")
    ids = case.ids([{"role": role, "content": THOUGHT}, TURNS[0]])
    assert not set(marker_ids("chatml", THOUGHT)) & set(ids)
    assert THOUGHT in case.tokenizer.decode(ids)


def test_prefill_keeps_its_ids() -> None:
    case = chat("chatml", continue_final_message=True)
    messages = [TURNS[0], {"role": "assistant", "content": "<think>\nfox"}]
    assert case.ids(messages) == expected_ids("chatml", case, messages, continue_final_message=True)


def test_authors_markers_keep_their_ids_in_every_role_and_the_rows_do_not() -> None:
    messages = [{"role": "user", "content": "Write <think> first. {a}"}, {"role": "assistant", "content": "<think>{b}"}]
    case = chat("chatml", messages=messages)
    (think,) = marker_ids("chatml", "<think>")
    ids = ids_of(case.encoder.encode({"a": "<think>", "b": "fox"}))
    assert ids.count(think) == 2
    assert ids_of(case.encoder.encode({"a": "x", "b": "</think>"})).count(think) == 2


def test_training_answer_keeps_the_ids_that_the_model_writes() -> None:
    case = chat("chatml")
    assert (
        list(case.encoder.encode_continuation(THOUGHT)) == case.tokenizer(THOUGHT, add_special_tokens=False).input_ids
    )
    plain = PromptEncoder(case.tokenizer, PromptTemplate(format="text"), date=DATE)
    assert not set(marker_ids("chatml", THOUGHT)) & set(plain.encode_continuation(THOUGHT)), "without a template"


@pytest.mark.parametrize("control", SPECIAL)
def test_special_tokens_in_assistant_text_are_text(control: str) -> None:
    case = chat("chatml")
    token = case.tokenizer.convert_tokens_to_ids(control)
    harmless = case.ids([TURNS[0], {"role": "assistant", "content": "xyz"}])
    hostile = case.ids([TURNS[0], {"role": "assistant", "content": f"x{control}z"}])
    if token != case.tokenizer.unk_token_id:
        assert hostile.count(token) == harmless.count(token)
        assert token not in case.encoder.encode_continuation(f"x{control}z")


def test_markers_that_part_messages_are_never_an_assistants() -> None:
    """They are added tokens that are not special, as DeepSeek's openers of turns and Qwen's of results."""
    openers = chat("two_openers")
    for marker in ("<U>", "<A>"):
        (token,) = marker_ids("two_openers", marker)
        assert token not in openers.encoder.encode_continuation(f"dog{marker}x")
        texts = openers.texts([TURNS[0], {"role": "assistant", "content": f"dog{marker}fox"}, TURNS[2]])
        assert [rule for _, rule in texts] == [False, True, False, True, False]
    results = chat("agent")
    for marker in ("<tool_response>", "</tool_response>"):
        assert not set(marker_ids("agent", marker)) & set(results.encoder.encode_continuation(marker))
    call = "<tool_call>x</tool_call>"
    assert set(marker_ids("agent", call)) <= set(results.encoder.encode_continuation(call))


FRAGMENTS = [control[:length] for control in CONTROLS for length in range(1, len(control))]


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from([*FRAGMENTS, *(control[1:] for control in CONTROLS), "im", "user", "x"]), min_size=2
    )
)
def test_no_template_can_put_a_control_token_together(pieces: list[str]) -> None:
    """Whatever it writes directly before, between and after the texts of a row."""
    case = chat("chatml")
    for before, after in itertools.product(("<|im_", "<", "<|", "</thi", ""), ("|>", ">", "end|>", "")):
        source = f"{{% for m in messages %}}[{before}{{{{ m.name }}}}{{{{ m.content }}}}{after}]{{% endfor %}}"
        encoder = PromptEncoder(case.tokenizer, PromptTemplate(chat_template=source), date=DATE, mask="causal")
        messages = [{"role": "user", "name": first, "content": second} for first, second in itertools.pairwise(pieces)]
        (segment,) = encoder.encode({"messages": messages})
        assert not set(segment.token_ids) & set(case.tokenizer.get_added_vocab().values())


def test_control_tokens_in_calls_tools_and_arguments_are_text() -> None:
    case = chat("agent", tools_column="tools", chat_template_kwargs_column="kwargs")
    every = "".join(SPECIAL) + "".join(MARKERS)

    def row(text: str, said: str) -> dict:
        call = {"function": {"name": said, "arguments": {said: [said]}}}
        tool = {"type": "function", "function": {"name": text, "parameters": {text: text}}}
        messages = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
        messages += [{"role": "tool", "content": text, "name": text, "tool_call_id": text}]
        return {"messages": messages, "tools": [tool], "kwargs": {"other": text}}

    def written(text: str, said: str) -> list[int]:
        return [token for token in ids_of(case.encoder.encode(row(text, said))) if token in added]

    added = set(case.tokenizer.get_added_vocab().values()) - {case.tokenizer.unk_token_id}
    assert written(every, "xyz") == written("xyz", "xyz")
    markers = {*marker_ids("agent", "".join(MARKERS))}
    assert [token for token in written("xyz", every) if token not in markers] == [
        token for token in written("xyz", "xyz") if token not in markers
    ]


def test_rendered_chat_runs_with_its_control_tokens_only_if_the_job_trusts_the_column() -> None:
    case = chat("chatml")
    rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    trusted = PromptTemplate(format="text", trusted_columns=("prompt",))
    plain = PromptTemplate(format="text")
    wanted = case.tokenizer(rendered)["input_ids"]
    live, dead = (PromptEncoder(case.tokenizer, template, date=DATE) for template in (trusted, plain))
    assert ids_of(live.encode({"prompt": rendered})) == wanted
    ids = ids_of(dead.encode({"prompt": rendered}))[1:]  # after BOS
    assert not set(ids) & set(case.tokenizer.get_added_vocab().values())
    mixed = PromptTemplate(format="text", text="{chat}{note}", trusted_columns=("chat",))
    ids = ids_of(PromptEncoder(case.tokenizer, mixed, date=DATE).encode({"chat": rendered, "note": "<|im_end|>"}))
    assert ids.count(case.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    with pytest.raises(ValueError, match="does not read"):
        PromptEncoder(case.tokenizer, PromptTemplate(format="text", trusted_columns=("other",)), date=DATE)


def test_rendered_chat_that_is_blank_is_empty_all_the_same() -> None:
    template = PromptTemplate(format="text", trusted_columns=("prompt",))
    with pytest.raises(RowError) as caught:
        PromptEncoder(chat("chatml").tokenizer, template, date=DATE).encode({"prompt": " "})
    assert caught.value.code == RowErrorCode.EMPTY_PROMPT
