"""Batch files of OpenAI's format, in and out, by the types of OpenAI's own client."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from commands import segue
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Batch, BatchError, Completion
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams

from segue.pipeline.formats.openai.parameters import CHAT, COMPLETIONS, DEFAULTS
from segue.pipeline.formats.openai.requests_file import BadLine, import_requests
from segue.pipeline.ledger.manifest import ForeignOutput
from segue.pipeline.problems import JobRefused
from segue.workers.prompts.conversation import ROLES


def line(custom_id: str, body: Any, url: str = CHAT) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def chat(text: str, **more: Any) -> CompletionCreateParamsNonStreaming:
    return CompletionCreateParamsNonStreaming(
        model="gpt-5",
        messages=[
            {"role": "developer", "content": "Answer in one word."},
            {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": "Please."}]},
        ],
        **more,
    )


def lines_of(path: Path) -> dict[str, dict[str, Any]]:
    return {found["custom_id"]: found for found in map(json.loads, path.read_text().splitlines())}


def imported(tmp_path: Path, *lines: str | bytes) -> tuple[list[dict[str, Any]], list[BadLine]]:
    """(rows, bad lines)"""
    raw = b"\n".join(each if isinstance(each, bytes) else each.encode() for each in lines)
    (tmp_path / "requests.jsonl").write_bytes(raw)
    found = import_requests(str(tmp_path / "requests.jsonl"), str(tmp_path / "work"))
    rows = pq.read_table(found.path).to_pylist()
    assert found.num_rows == len(rows)
    return rows, list(found.bad_lines())


def params_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says beside OpenAI's defaults."""
    params = json.loads(row["sampling_params"])
    return {name: value for name, value in params.items() if DEFAULTS.get(name) != value}


def test_batch_file_of_the_client_runs_and_its_results_load_as_the_clients_types(tmp_path, model_directory, here):
    requests = tmp_path / "requests.jsonl"
    good = {
        "plain": chat("one", max_completion_tokens=4),
        "many": chat("two", max_tokens=3, n=2, temperature=0.7, seed=11, stop=["x"]),
        "nulls": chat(
            "three", max_tokens=2, response_format={"type": "text"}, user="me", logprobs=True, top_logprobs=2
        ),
    }
    bad = {
        "functions": chat("four", functions=[{"name": "f"}]),
        "picture": CompletionCreateParamsNonStreaming(
            model="m",
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://h/x.png"}}]}],
        ),
        "hot": chat("five", temperature=-1.0),
        "long": chat("y" * 5000),
    }
    told = [line(name, body) for name, body in {**good, **bad}.items()]
    other = TextParams(model="m", prompt="x")
    told += [line("plain", chat("again")), "not JSON {", line("elsewhere", other, COMPLETIONS)]
    requests.write_text("\n".join(told) + "\n")
    answers = tmp_path / "results.jsonl"
    command = ("batch", requests, "--model", model_directory, "-o", answers, "--quiet", "--json")
    code, out, err = segue(*command)
    assert code == 0, err
    batch = Batch.model_validate_json(out.splitlines()[-1])
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 10, "completed": 3, "failed": 7}
    assert batch.output_file_id == str(answers)
    results = lines_of(answers)
    assert results.keys() == good.keys()
    completions = {name: ChatCompletion.model_validate(each["response"]["body"]) for name, each in results.items()}
    assert all(each["error"] is None and each["response"]["status_code"] == 200 for each in results.values())
    for name, found in completions.items():
        assert found.usage is not None
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
        assert [choice.index for choice in found.choices] == list(range(2 if name == "many" else 1))
        assert all(choice.finish_reason in ("stop", "length") for choice in found.choices)
        assert all(choice.message.content is not None for choice in found.choices)
    assert results["plain"]["response"]["body"]["usage"]["completion_tokens"] <= 4
    assert [json.loads(each)["custom_id"] for each in answers.read_text().splitlines()] == list(good)
    choice = completions["nulls"].choices[0]
    assert completions["plain"].choices[0].logprobs is None
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert (
        bytes(byte for token in tokens for byte in token.bytes or ()).decode(
            "utf-8", "ignore"
        )  # the last may be half a character
        == choice.message.content
    )
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    assert all(token.logprob <= token.top_logprobs[0].logprob <= 0 for token in tokens)
    errors = [json.loads(each) for each in (tmp_path / "results.errors.jsonl").read_text().splitlines()]
    messages = {each["custom_id"]: BatchError.model_validate(each["error"]) for each in errors}
    assert all(each["response"] is None for each in errors)
    assert messages.keys() == {"functions", "picture", "hot", "long", "plain", "elsewhere", None}
    assert messages["functions"].message == "functions: not supported"
    assert messages["functions"].param == "functions"
    assert messages["picture"].message == "messages.0.content.0: image_url parts are not supported, only text"
    assert messages["hot"].message == "temperature: Input should be greater than or equal to 0"
    assert messages["long"].code == "PROMPT_TOO_LONG"
    assert messages["plain"].message == "custom_id: line 1 has the same"
    assert messages[None].message == "the line is not JSON in UTF-8"
    assert [messages[name].line for name in ("functions", "picture", None)] == [4, 5, 9]
    assert "1 x invalid_request: functions: not supported" in err
    # Again: everything is there already.
    answers.unlink()
    code, out, _ = segue(*command)
    assert code == 0
    assert lines_of(answers).keys() == good.keys()
    requests.write_text(told[0])
    code, _, err = segue(*command)
    assert code == 2
    assert "another file" in err


def test_batch_of_completions_loads_as_completions(tmp_path, here):
    requests = tmp_path / "requests.jsonl"
    bodies = {f"r{n}": TextParams(model="m", prompt=f"text {n}") for n in range(5)}
    requests.write_text("\n".join(line(name, body, COMPLETIONS) for name, body in bodies.items()))
    answers = tmp_path / "r.jsonl"
    code, out, err = segue("batch", requests, "--model", "echo", "-o", answers, "--max-tokens", "6", "--quiet")
    assert code == 0, err
    assert Batch.model_validate_json(out.splitlines()[-1]).endpoint == COMPLETIONS
    found = {name: Completion.model_validate(each["response"]["body"]) for name, each in lines_of(answers).items()}
    assert {name: each.choices[0].text for name, each in found.items()} == {f"r{n}": f"text {n}" for n in range(5)}


def test_import_keeps_what_a_request_says_and_fills_in_openais_defaults(tmp_path):
    (plain, set_), bad = imported(
        tmp_path, line("a", chat("x")), line("b", chat("y", temperature=0, max_tokens=5, stop="q"))
    )
    assert json.loads(plain["sampling_params"]) == {"temperature": 1.0, "top_p": 1.0}
    assert json.loads(set_["sampling_params"]) == {"temperature": 0.0, "top_p": 1.0, "max_tokens": 5, "stop": "q"}
    first, second = plain["messages"]
    assert first["role"] == ("developer" if "developer" in ROLES else "system")
    assert first["content"] == [{"type": "text", "text": "Answer in one word."}]
    assert [part["text"] for part in second["content"]] == ["x", "Please."]
    assert (plain["line"], set_["line"], bad) == (1, 2, [])


def test_import_takes_a_response_format_as_the_form_of_the_answer(tmp_path):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    told = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    rows, _ = imported(
        tmp_path,
        line("a", chat("x", response_format=told)),
        line("b", chat("x", response_format={"type": "json_object"})),
        line("c", chat("x", response_format={"type": "text"})),
    )
    forms = [json.loads(row["sampling_params"]).get("structured_outputs") for row in rows]
    assert forms == [{"json": schema}, {"json": {"type": "object"}}, None]


@given(st.lists(st.one_of(st.binary(max_size=40), st.just(line("a", chat("x")).encode())), max_size=8))
def test_import_of_any_bytes_ends_in_a_row_a_line(tmp_path_factory, raw):
    folder = tmp_path_factory.mktemp("any")
    lines = [line("first", chat("x")).encode(), *(each.replace(b"\n", b"") for each in raw)]
    (folder / "r.jsonl").write_bytes(b"\n".join(lines))
    found = import_requests(str(folder / "r.jsonl"), str(folder / "work"))
    num_lines = sum(bool(each.strip()) for each in lines)
    assert found.num_rows + len(list(found.bad_lines())) == num_lines


def test_import_of_another_file_into_the_same_folder_is_refused(tmp_path):
    imported(tmp_path, line("a", chat("x")))
    assert len(imported(tmp_path, line("a", chat("x")))[0]) == 1
    with pytest.raises(ForeignOutput, match="another file"):
        imported(tmp_path, line("b", chat("x")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "got no line"),
        ("\n\n", "got no line"),
        ("{}", "requests.jsonl:1: url: got null"),
        ("\na,b,c", "requests.jsonl:2: got the line is not JSON"),
        (line("a", {}, "/v1/embeddings"), "requests.jsonl:1: url: got '/v1/embeddings', wanted one of"),
    ],
)
def test_import_of_what_is_no_file_of_requests_is_refused(tmp_path, text, said):
    with pytest.raises(JobRefused, match=said):
        imported(tmp_path, text)
