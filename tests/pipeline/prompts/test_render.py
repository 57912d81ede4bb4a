"""Rows of the dataset to rows of the plan: whatever is wrong with a row stays its own error."""

import datetime
import json
from typing import Any

import pyarrow as pa
import pytest
from render_specs import TEXT, render_spec

from segue.attention.segments import num_tokens
from segue.pipeline.dataset.blocks import block_of
from segue.pipeline.ledger.chains import decode_chain
from segue.pipeline.ledger.units import PASSED
from segue.pipeline.prompts.render import encoder_of, render_block
from segue.workers.prompts.template import PromptTemplate


def rendered(columns: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    return render_block(block_of(pa.table(columns), "a.parquet", 100), render_spec(**changes)).to_pylist()


def codes(rows: list[dict[str, Any]]) -> list[str | None]:
    """Error codes; a row has either a chain or an error."""
    assert all((row["chain"] == b"") == (row["error"] is not None) for row in rows)
    return [row["error"] and row["error"]["code"] for row in rows]


def not_utf8(*values: bytes | None, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(values, pa.binary()).view(kind or pa.string())


def test_render_plain_text_row_has_its_tokens_and_provenance():
    (row,) = rendered({"prompt": ["hé"]})
    assert (row["src_path"], row["src_row"], row["sampling_params"]) == ("a.parquet", 100, None)
    (segment,) = decode_chain(row["chain"])
    tokenizer = encoder_of(render_spec())._hf_tokenizer
    assert tokenizer.decode(list(segment.token_ids)) == "hé"


def test_render_bad_rows_cost_themselves_only():
    rows = rendered({"prompt": not_utf8(b"good", b"\xff\xfe", None, b"", b" \n", b"x" * 10_001, b"y" * 1_000, b"fine")})
    wanted = ["BAD_UTF8", "NULL_PROMPT", "EMPTY_PROMPT", "EMPTY_PROMPT", "PROMPT_TOO_LARGE", "PROMPT_TOO_LONG"]
    assert codes(rows) == [None, *wanted, None]


def test_render_bad_utf8_in_a_dictionary_column_costs_its_row():
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), not_utf8(b"good", b"\xff"))
    assert codes(rendered({"prompt": column})) == [None, "BAD_UTF8", None]


def test_render_bad_utf8_inside_messages_costs_its_row():
    content = not_utf8(b"good", b"\xff")
    structs = pa.StructArray.from_arrays([pa.array(["user", "user"]), content], ["role", "content"])
    messages = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), structs)
    rows = rendered({"messages": messages}, template=PromptTemplate(), prompt_columns=("messages",))
    assert codes(rows) == [None, "BAD_UTF8"]


def test_render_bad_utf8_in_a_column_that_is_only_passed_through_is_passed_through():
    columns = {"prompt": ["good"], "note": not_utf8(b"\xff")}
    table = render_block(block_of(pa.table(columns), "a", 0), render_spec(passed_columns=("note",)))
    assert codes(table.select(["chain", "error"]).to_pylist()) == [None]
    assert table[f"{PASSED}note"].cast(pa.binary()).to_pylist() == [b"\xff"]


def test_render_errors_never_quote_the_row():
    secret = "s3cret"
    own = [None, json.dumps({"max_tokens": secret}), json.dumps({secret: 1})]
    rows = rendered({"prompt": [secret * 200, secret, secret], "sampling_params": own}, max_model_len=100)
    assert codes(rows) == ["PROMPT_TOO_LONG", "BAD_PARAMS", "BAD_PARAMS"]
    assert secret not in repr([row["error"] for row in rows])


def test_render_prompt_of_exactly_the_limit_is_too_long_and_one_less_is_not():
    rows = rendered({"prompt": ["x" * 9, "x" * 10]}, max_model_len=10)
    assert codes(rows) == [None, "PROMPT_TOO_LONG"]
    assert "10 tokens" in rows[1]["error"]["message"]
    assert "limits.max_model_len" in rows[1]["error"]["message"]


def test_render_prompt_over_the_sliding_window_says_so():
    (row,) = rendered({"prompt": ["x" * 64]}, max_model_len=64, window=64)
    assert "sliding window of 64" in row["error"]["message"]


def test_render_limit_below_the_window_is_named_as_the_limit():
    (row,) = rendered({"prompt": ["x" * 64]}, max_model_len=32, window=64)
    assert "limits.max_model_len" in row["error"]["message"]


def test_render_row_parameters_as_struct_and_as_json_are_the_same():
    own = [{"max_tokens": 3, "stop": ["a"]}, {"max_tokens": None, "stop": None}, None]
    structs = rendered({"prompt": ["x"] * 3, "sampling_params": own})
    texts = rendered({"prompt": ["x"] * 3, "sampling_params": ['{"max_tokens": 3, "stop": ["a"]}', "{}", None]})
    assert [row["sampling_params"] for row in structs] == [row["sampling_params"] for row in texts]
    assert json.loads(structs[0]["sampling_params"]) == {"max_tokens": 3, "stop": ["a"]}
    assert structs[2]["sampling_params"] is None


@pytest.mark.parametrize(
    "own",
    [
        '{"max_tokens": 0}',
        '{"temprature": 1}',
        '{"temperature": NaN}',
        '{"min_tokens": 99}',
        '{"stop": [""]}',
        "[]",
        '"text"',
        "not JSON",
        "[" * 100_000,
        '{"max_tokens": ' + "9" * 5000 + "}",
    ],
)
def test_render_bad_row_parameters_cost_their_row(own):
    rows = rendered({"prompt": ["x", "y"], "sampling_params": [own, None]})
    assert codes(rows) == ["BAD_PARAMS", None]


def test_render_bad_utf8_in_row_parameters_costs_its_row():
    rows = rendered({"prompt": ["x", "y"], "sampling_params": not_utf8(b"\xff", b"{}")})
    assert codes(rows) == ["BAD_UTF8", None]


def test_render_chat_template_that_raises_for_a_row_costs_that_row():
    source = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}"
        "<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    )
    rows = rendered({"prompt": ["yes", "no", "maybe"]}, template=PromptTemplate(chat_template=source))
    assert codes(rows) == [None, "TEMPLATE_ERROR", None]


def test_render_segment_mask_keeps_messages_apart_and_causal_joins_them():
    template = PromptTemplate.model_validate(
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "{prompt}"}]}
    )
    chains = {
        mask: decode_chain(rendered({"prompt": ["x"]}, template=template, mask=mask)[0]["chain"])
        for mask in ("segment", "causal")
    }
    assert [segment.bidirectional for segment in chains["segment"]] == [True, True, False]
    assert [segment.bidirectional for segment in chains["causal"]] == [False]
    assert num_tokens(chains["segment"]) == num_tokens(chains["causal"])


def test_render_prints_the_date_of_the_plan_not_todays():
    source = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
    template = PromptTemplate(chat_template=source)
    (row,) = rendered({"prompt": ["x"]}, template=template, date="2020-05-06")
    tokens = [token for segment in decode_chain(row["chain"]) for token in segment.token_ids]
    text = encoder_of(render_spec())._hf_tokenizer.decode(tokens)
    assert datetime.date(2020, 5, 6).strftime("%d %b %Y") in text


def test_render_empty_block_has_the_columns_of_a_full_one():
    columns = {"prompt": pa.array(["x"]), "n": pa.array([1])}
    block = block_of(pa.table(columns), "a", 0)
    both = render_spec(passed_columns=("n", "prompt"))
    assert render_block(block.slice(0, 0), both).schema == render_block(block, both).schema


def test_render_prompt_without_columns_gives_one_row_for_each_of_the_dataset():
    block = pa.table({"src_path": ["a", "a"], "src_row": [0, 1], "input": pa.array([{}, {}], pa.struct([]))})
    rows = render_block(block, render_spec(PromptTemplate(format="text", text="same"), prompt_columns=())).to_pylist()
    assert codes(rows) == [None, None]


TOOLED = (
    "{% for t in tools or [] %}<|start|>{{ t | tojson }}<|end|>{% endfor %}"
    "{% if tone is defined %}{{ tone }}{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<|end|>{% endfor %}"
)
TOOL = {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}
OTHER = {"name": "time", "parameters": {"properties": {"zone": {"type": "string"}}}}
CALL = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALL_BACK = {"function": {"name": "time", "arguments": {"zone": "CET"}}}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
OTHER_CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL_BACK]}]


def text_of(row: dict[str, Any]) -> str:
    tokens = [token for segment in decode_chain(row["chain"]) for token in segment.token_ids]
    return str(encoder_of(render_spec())._hf_tokenizer.decode(tokens))


def told(columns: dict[str, Any]) -> list[dict[str, Any]]:
    names = ("messages", "tools", "kwargs")
    template = PromptTemplate(chat_template=TOOLED, tools_column="tools", chat_template_kwargs_column="kwargs")
    return rendered(columns, template=template, prompt_columns=names)


def test_render_chats_and_tools_as_structs_and_as_json_are_the_same():
    """A struct has null where a mapping lacks the key: each tool, and each call, has the other one's parameters."""
    kwargs = [{"tone": "kind"}, {"tone": None}]
    structs = told({"messages": [CHAT, OTHER_CHAT], "tools": [[TOOL], [OTHER]], "kwargs": kwargs})
    values = [[json.dumps(value) for value in column] for column in ([CHAT, OTHER_CHAT], [[TOOL], [OTHER]], kwargs)]
    texts = told(dict(zip(("messages", "tools", "kwargs"), values, strict=True)))
    assert codes(structs) == [None, None]
    assert [row["chain"] for row in structs] == [row["chain"] for row in texts]
    assert text_of(structs[0]).startswith(f"<|start|>{json.dumps(TOOL)}<|end|>kind<|start|>user\nhi")
    assert json.dumps(CALL) in text_of(structs[0])
    assert "null" not in text_of(structs[1])


def test_render_bad_tools_and_arguments_cost_their_rows():
    chats = [json.dumps(CHAT)] * 6
    tools = [None, "[]", "nonsense", "[1]", json.dumps([TOOL]), None]
    kwargs = [None, "{}", None, None, '{"messages": []}', "[]"]
    rows = told({"messages": chats, "tools": tools, "kwargs": kwargs})
    assert codes(rows) == [None, None, *["BAD_MESSAGES"] * 4]
    assert "nonsense" not in repr([row["error"] for row in rows])


def test_render_conversations_are_read_by_name_where_there_is_no_other_column():
    shared = [[{"from": "human", "value": "hi"}]]
    (row,) = rendered({"conversations": shared}, template=PromptTemplate(), prompt_columns=("conversations",))
    (wanted,) = rendered({"prompt": ["hi"]}, template=PromptTemplate())
    assert row["chain"] == wanted["chain"]


def test_render_deep_json_costs_its_row():
    deep = '[{"role": "user", "content": "x", "tool_calls": [' + '{"a":' * 200 + "1" + "}" * 200 + "]}]"
    rows = rendered({"messages": [deep, "[" * 9_000]}, template=PromptTemplate(), prompt_columns=("messages",))
    assert codes(rows) == ["BAD_MESSAGES", "BAD_MESSAGES"]


def test_render_rendered_chat_is_live_only_in_a_trusted_column():
    chat = "<|start|>user\nhi<|end|>"
    trusted = PromptTemplate(format="text", trusted_columns=("prompt",))
    (live,), (dead,) = (rendered({"prompt": [chat]}, template=template) for template in (trusted, TEXT))
    lengths = [num_tokens(decode_chain(row["chain"])) for row in (live, dead)]
    assert lengths == [len("user\nhi") + 2, len(chat)]
