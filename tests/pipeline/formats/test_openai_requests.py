"""Requests of a batch file under the names of OpenAI and vLLM: what each becomes, or which name its error has."""

import json
from typing import Any

import pytest
from commands import last_line, segue

from segue.pipeline.formats.openai.parameters import CHAT, COMPLETIONS, PROMPT_COLUMNS
from segue.pipeline.formats.openai.request import BadRequest, asked_by, parse_line
from segue.pipeline.formats.openai.requests_file import import_requests
from segue.workers.rows.params import SamplingParams

USER = [{"role": "user", "content": "x"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
LATER = {  # fields of SamplingParams that are to come
    "logit_bias": {"7": -100.0}, "bad_words": ["no"], "allowed_token_ids": [7, 8], "prompt_logprobs": 1,
}  # fmt: skip


def asked(body: dict[str, Any], endpoint: str = CHAT, **members: Any) -> dict[str, Any]:
    told = {"custom_id": "c", "method": "POST", "url": endpoint, "body": body, **members}
    return asked_by(parse_line(json.dumps(told).encode()), endpoint)


def params(body: dict[str, Any], endpoint: str = CHAT) -> dict[str, Any]:
    prompt = {"messages": USER} if endpoint == CHAT else {"prompt": "x"}
    return json.loads(asked(prompt | body, endpoint)["sampling_params"])


@pytest.mark.parametrize(
    ("body", "becomes"),
    [
        ({"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}, {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}),
        ({"stop_token_ids": [7], "ignore_eos": True, "min_tokens": 3},
         {"stop_token_ids": [7], "ignore_eos": True, "min_tokens": 3}),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True, "stop": ["a", "b"]},
         {"skip_special_tokens": False, "include_stop_str_in_output": True, "stop": ["a", "b"]}),
        ({"stop": [], "stop_token_ids": [], "logit_bias": {}, "bad_words": [], "seed": None, "n": None}, {}),
        ({"max_tokens": 5, "max_completion_tokens": 9}, {"max_tokens": 9}),
        ({"min_tokens": 50}, {"min_tokens": 50}),  # the job's max_tokens decides
        ({"guided_json": SCHEMA}, {"structured_outputs": {"json": SCHEMA}}),
        ({"guided_regex": "a+"}, {"structured_outputs": {"regex": "a+"}}),
        ({"guided_choice": ["a"], "guided_decoding_backend": "auto"}, {"structured_outputs": {"choice": ["a"]}}),
        ({"guided_json_object": True}, {"structured_outputs": {"json": {"type": "object"}}}),
        ({"structured_outputs": {"json": SCHEMA, "disable_fallback": False}}, {"structured_outputs": {"json": SCHEMA}}),
        ({"structured_outputs": {"json_object": True}}, {"structured_outputs": {"json": {"type": "object"}}}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
         {"structured_outputs": {"json": SCHEMA}}),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, {"structured_outputs": {"regex": "a"}}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "request_id": "r", "priority": 3,
          "parallel_tool_calls": True, "stream": False, "tool_choice": "auto", "add_generation_prompt": True,
          "continue_final_message": False, "echo": False, "length_penalty": 1.0, "use_beam_search": False,
          "include_reasoning": True, "spaces_between_special_tokens": True, "add_special_tokens": False}, {}),
    ],
)  # fmt: skip
def test_parameters_of_openai_and_vllm_are_taken(body, becomes):
    assert params(body) == {"temperature": 1.0, "top_p": 1.0} | becomes


@pytest.mark.parametrize(("value", "becomes"), [(0, {"logprobs": 0}), (3, {"logprobs": 3}), (None, {})])
def test_logprobs_of_completions_are_a_number(value, becomes):
    assert params({"logprobs": value}, COMPLETIONS) == {"temperature": 1.0, "top_p": 1.0} | becomes


@pytest.mark.parametrize("name", LATER)
def test_every_field_of_sampling_params_is_taken_and_no_other(name):
    if name in SamplingParams.model_fields:
        assert params({name: LATER[name]})[name] == LATER[name]
        return
    with pytest.raises(BadRequest, match=f"^{name}: not supported$"):
        params({name: LATER[name]})


def test_tools_and_arguments_of_the_template_are_columns_if_prompts_have_them():
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    body = {"messages": USER, "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    if not PROMPT_COLUMNS:
        with pytest.raises(BadRequest, match=r"^tools: not supported$"):
            asked(body)
        return
    row = asked(body | {"reasoning_effort": "low"})
    assert json.loads(row["tools"]) == tools
    assert json.loads(row["chat_template_kwargs"]) == {"reasoning_effort": "low", "enable_thinking": False}


def test_messages_of_agents_keep_all_that_they_have():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}, "index": 0}
    body = {
        "messages": [
            {"role": "user", "content": ["a", {"text": "b"}, {"type": "input_text", "text": "c"}], "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
            {"role": "tool", "content": "42", "tool_call_id": "1"},
            {"role": "assistant", "content": "so", "reasoning": "why"},
        ]
    }
    user, caller, tool, answer = asked(body)["messages"]
    assert ([part["text"] for part in user["content"]], user["name"]) == (["a", "b", "c"], "Ann")
    function = {"name": "f", "arguments": '{"a": 1}'}
    assert (caller["content"], caller["tool_calls"]) == (None, [{"function": function, "id": "1", "type": "function"}])
    assert (tool["role"], tool["tool_call_id"], tool["tool_calls"]) == ("tool", "1", None)
    assert (answer["reasoning_content"], answer["name"]) == ("why", None)


IMAGE = {"type": "image_url", "image_url": {"url": "https://SECRET"}}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"topk": 3}, "topk: not known (did you mean 'top_k'"),
        ({"SECRET words, no name": 3}, "a name: not known"),
        ({"stream": True}, "stream: true is not supported: a batch has no streams"),
        ({"tool_choice": "required"}, "tool_choice: required is not supported, only auto and none"),
        ({"tool_choice": {"type": "function", "function": {"name": "SECRET"}}}, "tool_choice: a named function is not"),
        ({"best_of": 2}, "best_of: not supported"),
        ({"echo": True}, "echo: not supported"),
        ({"logprobs": 2}, "logprobs: wanted true or false at /v1/chat/completions; top_logprobs is the number"),
        ({"top_logprobs": 2}, "top_logprobs: needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
        ({"chat_template": "SECRET"}, "chat_template: not supported"),
        ({"guided_grammar": "SECRET"}, "guided_grammar: not supported"),
        ({"guided_json": SCHEMA, "guided_regex": "SECRET"}, "guided_json, guided_regex: wanted only one of them"),
        ({"structured_outputs": {"structural_tag": "SECRET"}}, "structured_outputs: structural_tag is not supported"),
        ({"structured_outputs": {"SECRET": 1}}, "structured_outputs: a key is not supported"),
        ({"response_format": {"type": "SECRET"}}, "response_format.type: wanted text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format: json_schema belongs to type json_schema"),
        ({"guided_choice": []}, "structured_outputs.choice: Value should have at least 1 item"),
        ({"max_tokens": "SECRET"}, "max_tokens: Input should be a valid integer"),
        ({"max_completion_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"prompt": "SECRET"}, "prompt: is for /v1/completions"),
        ({"messages": []}, "messages: wanted a list of at least one message"),
        ({"messages": "SECRET"}, "messages: wanted a list of at least one message"),
        ({"messages": None}, "messages: wanted a list of at least one message"),
        ({"messages": ["SECRET"]}, "messages.0: Input should be"),
        ({"messages": [{"role": "SECRET", "content": "x"}]}, "messages.0.role: Input should be 'system'"),
        ({"messages": [{"role": "user"}]}, "messages.0: content: missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a valid list"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]},
         "messages.0.content.0: image_url parts are not supported, only text"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
         "messages.0.content.0: input_audio parts are not supported, only text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text: Field required"),
        ({"messages": [{"role": "user", "content": "x", "cache_control": {}}]}, "messages.0.cache_control: not known"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
         "messages.0.tool_calls.0.function: Field required"),
        ({"messages": [{"role": "assistant", "content": "x", "refusal": "SECRET"}]}, "messages.0.refusal: "),
    ],
)  # fmt: skip
def test_what_is_not_supported_or_not_known_is_named_and_nothing_is_quoted(body, said):
    with pytest.raises(BadRequest) as refused:
        asked({"messages": USER} | body)
    assert str(refused.value).startswith(said)
    assert "SECRET" not in str(refused.value)
    assert refused.value.param


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": ["a", "b"]}, "prompt: several texts in one request are not supported"),
        ({"prompt": [1, 2]}, "prompt: token ids are not supported, wanted a text"),
        ({"prompt": None}, "prompt: wanted a text"),
        ({"prompt": "x", "logprobs": True}, "logprobs: wanted an integer at /v1/completions"),
        ({"prompt": "x", "messages": USER}, "messages: is for /v1/chat/completions"),
        ({"prompt": "x", "suffix": "SECRET"}, "suffix: not supported"),
    ],
)
def test_what_completions_lack_is_named(body, said):
    with pytest.raises(BadRequest) as refused:
        asked(body, COMPLETIONS)
    assert str(refused.value).startswith(said)
    assert asked({"prompt": ["x"], "suffix": ""}, COMPLETIONS)["prompt"] == "x"


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"method": "GET"}, "method: wanted POST"),
        ({"url": "/v1/chat/completion"}, "url: wanted /v1/chat/completions or /v1/completions"),
        ({"url": COMPLETIONS}, "url: wanted /v1/chat/completions, as in the first line"),
        ({"body": None}, "body: wanted an object"),
    ],
)
def test_a_bad_member_of_a_line_keeps_its_custom_id(tmp_path, members, said):
    good = {"custom_id": "good", "method": "POST", "url": CHAT, "body": {"messages": USER, "max_tokens": 3}}
    lines = [json.dumps(good), json.dumps({**good, "custom_id": "bad", **members})]
    (tmp_path / "r.jsonl").write_text("\n".join(reversed(lines)))  # the bad line comes first
    if members.get("url") == COMPLETIONS:
        (tmp_path / "r.jsonl").write_text("\n".join(lines))
    found = import_requests(str(tmp_path / "r.jsonl"), str(tmp_path / "work"))
    (bad,) = found.bad_lines()
    assert (bad.custom_id, found.num_rows) == ("bad", 1)
    assert bad.message.startswith(said)


def test_a_file_of_one_line_with_a_byte_order_mark_is_answered_with_logprobs(tmp_path, here):
    body = {"prompt": "tell ö", "max_tokens": 3, "logprobs": 0, "top_k": 1}
    text = json.dumps({"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": body})
    (tmp_path / "r.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    code, out, err = segue("batch", tmp_path / "r.jsonl", "--model", "echo", "-o", tmp_path / "o.jsonl", "--quiet")
    assert code == 0, err
    assert last_line(out)["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    (choice,) = json.loads((tmp_path / "o.jsonl").read_text())["response"]["body"]["choices"]
    assert choice["text"] == "l ö"
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [0.0] * 3
    assert logprobs["tokens"] == [" ", "\ufffd", "\ufffd"]  # the echo's tokens are bytes
    assert logprobs["text_offset"] == [0, 1, 2]


def test_a_batch_of_error_lines_alone_has_failed_and_says_so(tmp_path):
    lines = [{"custom_id": f"r{n}", "url": CHAT, "body": {"messages": USER, "best_of": 2}} for n in range(3)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, err = segue("batch", tmp_path / "r.jsonl", "--model", "echo", "-o", tmp_path / "o.jsonl", "--quiet")
    assert code == 3
    batch = last_line(out)
    assert (batch["status"], batch["request_counts"]) == ("failed", {"total": 3, "completed": 0, "failed": 3})
    assert [error["line"] for error in batch["errors"]["data"]] == [1, 2, 3]
    assert "3 x invalid_request: best_of: not supported" in err
    assert "no request was answered" in err
    assert (tmp_path / "o.jsonl").read_text() == ""
    assert len((tmp_path / "o.errors.jsonl").read_text().splitlines()) == 3
