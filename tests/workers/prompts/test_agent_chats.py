"""Chats of agents: tools, calls, results and reasoning, as transformers hands them to a template."""

import json
from typing import Any

import pytest
from chat_templates import AGENT, DATE, SYSTEM, TURNS, chat, expected_ids

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.template import PromptTemplate

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
RESULTS = [{"role": "tool", "content": text, "tool_call_id": "a", "name": "weather"} for text in ("cold", "wet")]
AGENT_CHAT = [SYSTEM, TURNS[0], CALLING, *RESULTS, TURNS[1], TURNS[2]]


def refused(messages: Any, name: str = "agent", **columns: Any) -> RowError:
    with pytest.raises(RowError) as caught:
        chat(name).encoder.encode({"messages": messages, **columns})
    return caught.value


@pytest.mark.parametrize("kind", ["bytes", "first", "normalizer"])
def test_ids_of_an_agents_chat_are_transformers(kind: str) -> None:
    case = chat("agent", kind, tools=(TOOL,))
    assert case.ids(AGENT_CHAT) == expected_ids("agent", case, AGENT_CHAT, tools=[TOOL])


def test_tool_definitions_belong_to_their_turn_calls_are_causal_and_results_are_not() -> None:
    texts = chat("agent", tools=(TOOL,)).texts(AGENT_CHAT)
    assert [rule for _, rule in texts] == [True, True, False, True, False, True, False]
    system, _, calls, results, *_ = (text for text, _ in texts)
    assert system.startswith("<|im_start|>system\nBe kind.\n\n# Tools\n")
    assert system.endswith("<|im_end|>\n")
    assert calls.startswith("<|im_start|>assistant\n<tool_call>")
    assert calls.endswith("</tool_call><|im_end|>\n")
    assert results.startswith("<|im_start|>user")
    assert "cold" in results
    assert "wet" in results


def test_tools_without_a_system_message_are_a_bidirectional_segment_of_their_own() -> None:
    first, second, *_ = chat("agent", tools=(TOOL,)).texts(TURNS)
    assert first[0].startswith("<|im_start|>system\n# Tools\n")
    assert first[1]
    assert second == ("<|im_start|>user\nhello<|im_end|>\n", True)


def test_rows_tools_and_arguments_equal_the_jobs() -> None:
    job = chat("agent", tools=(TOOL,), chat_template_kwargs={"enable_thinking": False})
    rows = chat("agent", tools_column="tools", chat_template_kwargs_column="kwargs")
    wanted = job.ids(TURNS)
    assert wanted == expected_ids("agent", job, TURNS, tools=[TOOL], enable_thinking=False)
    for tools in ([TOOL], json.dumps([TOOL])):
        for kwargs in ({"enable_thinking": False}, '{"enable_thinking": false}'):
            row = {"messages": TURNS, "tools": tools, "kwargs": kwargs}
            assert [token for segment in rows.encoder.encode(row) for token in segment.token_ids] == wanted
    plain = rows.encoder.encode({"messages": TURNS, "tools": None, "kwargs": None})
    assert plain == chat("agent").encoder.encode({"messages": TURNS})


def test_messages_may_be_json_text() -> None:
    case = chat("agent")
    assert case.encoder.encode({"messages": json.dumps(AGENT_CHAT)}) == case.encoder.encode({"messages": AGENT_CHAT})


def test_arguments_as_json_text_stay_as_the_model_wrote_them_where_the_template_takes_them() -> None:
    text = '{"city":  "Oslo"}'
    call = {"type": "function", "function": {"name": "weather", "arguments": text}}
    messages = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}, *RESULTS]
    case = chat("agent")
    assert text in case.texts(messages)[1][0]
    assert case.ids(messages) == expected_ids("agent", case, messages)


def test_arguments_as_json_text_become_a_mapping_where_the_template_wants_one() -> None:
    source = AGENT.replace("f.arguments if f.arguments is string else ", "")
    case = chat("agent")
    encoder = PromptEncoder(case.tokenizer, PromptTemplate(chat_template=source), date=DATE)
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
    as_text = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}, *RESULTS]
    as_mapping = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, *RESULTS]
    assert encoder.encode({"messages": as_text}) == encoder.encode({"messages": as_mapping})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_each_name_is_shown_where_the_template_shows_it(name: str) -> None:
    case = chat("agent")
    last = {"role": "assistant", "content": "dog", name: "which?"}
    messages = [TURNS[0], last]
    assert "<think>\nwhich?\n</think>\n\ndog" in case.texts(messages)[1][0]
    assert case.ids(messages) == expected_ids("agent", case, messages)
    earlier = [TURNS[0], last, TURNS[2]]
    assert case.ids(earlier) == expected_ids("agent", case, earlier)


def test_null_and_empty_fields_say_nothing() -> None:
    bare = chat("agent").encoder.encode({"messages": TURNS})
    filled = [turn | {"tool_calls": [], "name": None, "tool_call_id": None, "refusal": None} for turn in TURNS]
    assert chat("agent").encoder.encode({"messages": filled}) == bare


def test_developer_is_a_system_message_to_a_template_that_does_not_know_it() -> None:
    developer = {"role": "developer", "content": "Be kind."}
    assert chat("agent").texts([developer, *TURNS]) == chat("agent").texts([SYSTEM, *TURNS])
    assert chat("chatml").texts([developer, *TURNS])[0] == ("<|im_start|>developer\nBe kind.<|im_end|>\n", True)


def test_what_a_template_would_lose_is_an_error_of_the_row() -> None:
    assert refused(AGENT_CHAT, "chatml").code == RowErrorCode.TEMPLATE_ERROR
    unread = refused([TURNS[0] | {"images": ["x"]}])
    assert unread.code == RowErrorCode.BAD_MESSAGES
    assert "lost" in unread.message
    tools = chat("chatml", tools_column="tools").encoder
    with pytest.raises(RowError, match="no tools"):
        tools.encode({"messages": TURNS, "tools": [TOOL]})
    with pytest.raises(ValueError, match="shows no tools"):
        chat("chatml", tools=(TOOL,))


def test_call_that_a_template_drops_is_an_error_of_the_row() -> None:
    source = AGENT.replace("for call in m.tool_calls or []", "for call in (m.tool_calls or [])[:1]")
    encoder = PromptEncoder(chat("agent").tokenizer, PromptTemplate(chat_template=source), date=DATE)
    with pytest.raises(RowError, match="loses message 1"):
        encoder.encode({"messages": [TURNS[0], CALLING, *RESULTS]})


@pytest.mark.parametrize(
    "messages",
    [
        "not JSON",
        '{"role": "user"}',
        "[" * 10_000,
        [{"role": "assistant", "content": None}],
        [{"role": "user", "content": None, "tool_calls": [CALL]}],
        [TURNS[0], {"role": "assistant", "content": "x", "tool_calls": "weather"}],
        [TURNS[0], {"role": "assistant", "content": "x", "tool_calls": ["weather"]}],
        [{"role": "user", "content": "x", "name": 5}],
        [{"role": "user", "content": "x", "name": "y" * 3, 5: "key"}],
        [TURNS[0], {"role": "assistant", "content": "x", "reasoning_content": ["y"]}],
        [TURNS[0], {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": b"x"}}]}],
    ],
)
def test_messages_that_make_no_sense_are_bad(messages: Any) -> None:
    assert refused(messages).code == RowErrorCode.BAD_MESSAGES


@pytest.mark.parametrize(
    ("column", "value"),
    [("tools", "x"), ("tools", [1]), ("tools", {"a": 1}), ("tools", "{}"), ("kwargs", "[]"), ("kwargs", 5),
     ("kwargs", {"messages": []}), ("kwargs", {"bos_token": "x"}), ("kwargs", '{"add_generation_prompt": false}')],
)  # fmt: skip
def test_tools_and_arguments_that_make_no_sense_are_bad(column: str, value: Any) -> None:
    case = chat("agent", tools_column="tools", chat_template_kwargs_column="kwargs")
    with pytest.raises(RowError) as caught:
        case.encoder.encode({"messages": TURNS, "tools": None, "kwargs": None, column: value})
    assert caught.value.code == RowErrorCode.BAD_MESSAGES


HUMAN, GPT = {"from": "human", "value": "hello"}, {"from": "gpt", "value": "dog"}


def test_sharegpt_conversations_are_openais() -> None:
    shared = [
        {"from": "system", "value": "Be kind."},
        HUMAN,
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})},
        {"from": "observation", "value": "cold"},
        GPT,
        {"from": "human", "value": "fox"},
    ]
    call = {"type": "function", "function": CALL["function"]}
    openai = [
        SYSTEM, TURNS[0], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "cold"}, *TURNS[1:],
    ]  # fmt: skip
    case = chat("agent")
    assert case.encoder.encode({"conversations": shared}) == case.encoder.encode({"messages": openai})
    assert case.encoder.encode({"messages": json.dumps(shared)}) == case.encoder.encode({"messages": openai})


@pytest.mark.parametrize(
    "shared",
    [
        [{"from": "robot", "value": "x"}],
        [{"from": ["human"], "value": "x"}],
        [HUMAN, {"from": "gpt"}],
        [HUMAN, {"from": "function_call", "value": "weather"}],
        [HUMAN, {"from": "function_call", "value": '{"arguments": {}}'}],
    ],
)
def test_sharegpt_conversation_that_makes_no_sense_is_bad(shared: Any) -> None:
    assert refused(shared).code == RowErrorCode.BAD_MESSAGES
