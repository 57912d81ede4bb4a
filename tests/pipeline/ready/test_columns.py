"""A job's columns: in every file, of types that fit, and of names that do not clash with results."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from bad.cases import job, write
from in_process import run_here
from parquet_files import write_encrypted
from ready_jobs import ready_job, refusal

from segue.pipeline.dataset.columns import unified
from segue.pipeline.ledger.columns import RESULT_COLUMNS
from segue.pipeline.ready.checks import CheckedJob

STRUCT = pa.struct({"role": pa.string(), "content": pa.string()})


def three_files(folder: Path, second: dict[str, object]) -> None:
    for name, table in (("a", {"prompt": ["x"], "id": [1]}), ("b", second), ("c", {"prompt": ["y"], "id": [2]})):
        write(folder / f"in/{name}.parquet", table)


def passes(path: Path) -> CheckedJob:
    return ready_job(path).checked


def test_check_good_job_has_inputs_and_columns(tmp_path):
    three_files(tmp_path, {"prompt": ["z"], "id": [3]})
    checked = passes(job(tmp_path, output={"path": "out", "columns": ["id"]}))
    assert [file.src_path for file in checked.inputs] == ["a.parquet", "b.parquet", "c.parquet"]
    assert (checked.columns.prompt, checked.columns.passed) == (("prompt",), ("id",))
    assert checked.columns.schema == pa.schema({"prompt": pa.string(), "id": pa.int64()})


def test_check_columns_that_nobody_asked_for_are_not_read(tmp_path):
    write(tmp_path / "in/a.parquet", {"prompt": ["x"], "blob": [b"x"], "id": [1]})
    sections = {"output": {"path": "out", "columns": []}}
    assert passes(job(tmp_path, **sections)).columns.schema.names == ["prompt"]


def test_check_column_missing_in_second_of_three_files_is_named(tmp_path):
    three_files(tmp_path, {"promt": ["z"], "id": [3]})
    line = refusal(job(tmp_path, output={"path": "out", "columns": ["id"]}))
    assert line.startswith("prompt: ")
    assert "b.parquet without column 'prompt'" in line
    assert "1 of 3 lack it" in line
    assert "did you mean 'promt'" in line


def test_check_column_in_other_case_names_every_candidate(tmp_path):
    write(tmp_path / "in/a.parquet", {"Prompt": ["x"], "PROMPT": ["y"]})
    assert "did you mean 'PROMPT' or 'Prompt'" in refusal(job(tmp_path))


def test_check_exact_case_wins_over_other_case(tmp_path):
    write(tmp_path / "in/a.parquet", {"Prompt": ["x"], "prompt": ["y"]})
    assert passes(job(tmp_path)).columns.prompt == ("prompt",)


def test_check_missing_column_that_is_like_no_other_says_which_there_are(tmp_path):
    write(tmp_path / "in/a.parquet", {"question": ["x"], "answer": ["y"]})
    assert "it has 'question', 'answer'" in refusal(job(tmp_path))
    write(tmp_path / "in/a.parquet", {f"c{n:04}": [n] for n in range(5000)})
    assert "'c0011' and 4,988 more" in refusal(job(tmp_path))


SECRETS: dict[str, Any] = {
    "prompt": ["x"],
    "a": [{"b": 1, "c": [{"d": 1}]}],
    "secret": ["s"],
    "m": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())),
    "n": [1],
}


@pytest.mark.parametrize(
    ("leaves", "name"),
    [(["prompt"], "prompt"), (["secret"], "secret"), (["a.c.list.element.d"], "a"), (["m.key_value.value"], "m")],
)
def test_check_encrypted_column_is_refused_by_name_and_others_are_read(tmp_path, leaves, name):
    (tmp_path / "in").mkdir()
    write_encrypted(tmp_path / "in" / "a.parquet", pa.table(SECRETS), leaves)
    line = refusal(job(tmp_path))
    assert f"a.parquet with column '{name}', which is encrypted" in line
    assert line.startswith("prompt: " if name == "prompt" else "output.columns: ")
    if name != "prompt":
        others = [other for other in SECRETS if other != name]
        assert run_here(job(tmp_path, output={"path": "out", "columns": others})).num_errors == 0
        inputs = {"path": "in", "filters": [[name, "==", None]]}
        assert "encrypted" in refusal(job(tmp_path, input=inputs, output={"path": "out2", "columns": []}))


def test_check_unknown_placeholder_is_named(tmp_path):
    write(tmp_path / "in/a.parquet", {"document": ["x"]})
    prompt = {"messages": [{"role": "user", "content": "{documnet}"}]}
    assert "'documnet'" in (line := refusal(job(tmp_path, prompt=prompt)))
    assert "did you mean 'document'" in line


def test_check_repeated_column_is_refused(tmp_path):
    write(tmp_path / "in/a.parquet", pa.table([["x"], ["y"]], names=["prompt", "prompt"]))
    assert "2 columns 'prompt'" in refusal(job(tmp_path))


def test_check_passed_column_missing_in_one_file_is_named(tmp_path):
    three_files(tmp_path, {"prompt": ["z"]})
    line = refusal(job(tmp_path))
    assert line.startswith("output.columns: ")
    assert "b.parquet without column 'id'" in line


@pytest.mark.parametrize("name", RESULT_COLUMNS["generate"])
def test_check_passed_column_named_like_a_result_is_refused(tmp_path, name):
    write(tmp_path / "in/a.parquet", {"prompt": ["x"], name: ["y"]})
    line = refusal(job(tmp_path))
    assert line.startswith("output.columns: ")
    assert f"'{name}'" in line
    assert passes(job(tmp_path, output={"path": "out", "columns": ["prompt"]})).inputs


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()), pa.null()],
    ids=str,
)
def test_check_prompt_of_string_like_type_passes(tmp_path, kind):
    write(tmp_path / "in/a.parquet", pa.table({"prompt": pa.array([None], kind)}))
    assert passes(job(tmp_path)).columns.schema.field("prompt").type == kind


@pytest.mark.parametrize(
    "kind",
    [pa.int64(), pa.float32(), pa.bool_(), pa.binary(), pa.list_(pa.string()), STRUCT, pa.list_(STRUCT)],
    ids=str,
)
def test_check_prompt_of_other_type_is_refused(tmp_path, kind):
    write(tmp_path / "in/a.parquet", pa.table({"prompt": pa.array([None], kind)}))
    line = refusal(job(tmp_path))
    assert line.startswith("prompt: ")
    assert f"of type {str(kind).split('<')[0]}" in line
    assert "dictionary of string" in line


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.float64(), pa.bool_(), pa.string()], ids=str)
def test_check_placeholder_of_scalar_type_passes(tmp_path, kind):
    write(tmp_path / "in/a.parquet", pa.table({"n": pa.array([None], kind)}))
    assert passes(job(tmp_path, prompt={"messages": [{"role": "user", "content": "{n}"}]})).columns.prompt == ("n",)


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.decimal128(5, 2), pa.list_(pa.int8()), pa.binary()], ids=str)
def test_check_placeholder_of_other_type_is_refused(tmp_path, kind):
    write(tmp_path / "in/a.parquet", pa.table({"n": pa.array([None], kind)}))
    assert "int, float, bool" in refusal(job(tmp_path, prompt={"format": "text", "text": "{n}"}))


PARTS = pa.struct({"role": pa.string(), "content": pa.list_(pa.struct({"type": pa.string(), "text": pa.string()}))})


@pytest.mark.parametrize(
    "kind", [pa.list_(STRUCT), pa.large_list(STRUCT), pa.list_(PARTS)], ids=["list", "large", "parts"]
)
def test_check_messages_column_is_used_when_there(tmp_path, kind):
    write(tmp_path / "in/a.parquet", pa.table({"messages": pa.array([[]], kind), "prompt": [1]}))
    assert passes(job(tmp_path)).columns.prompt == ("messages",)


@pytest.mark.parametrize(
    "kind",
    [pa.int64(), STRUCT, pa.list_(pa.string()), pa.list_(pa.struct({"role": pa.string()}))],
    ids=str,
)
def test_check_messages_of_other_type_are_refused(tmp_path, kind):
    write(tmp_path / "in/a.parquet", pa.table({"messages": pa.array([None], kind), "id": [1]}))
    assert "list<struct<role: string, content: string>>" in refusal(job(tmp_path))


SHARED = pa.struct({"from": pa.string(), "value": pa.string()})


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.list_(SHARED)], ids=str)
def test_check_messages_may_be_json_text_or_sharegpts(tmp_path, kind):
    write(tmp_path / "in/a.parquet", pa.table({"messages": pa.array([None], kind), "prompt": ["x"]}))
    assert passes(job(tmp_path)).columns.prompt == ("messages",)


def test_check_conversations_are_read_where_there_is_no_other_column(tmp_path):
    write(tmp_path / "in/a.parquet", pa.table({"conversations": pa.array([None], pa.list_(SHARED))}))
    assert passes(job(tmp_path)).columns.prompt == ("conversations",)


def test_check_columns_of_tools_and_arguments_are_read_and_of_a_fitting_type(tmp_path):
    tools = pa.list_(pa.struct({"name": pa.string()}))
    table = {"prompt": ["x"], "t": pa.array([None], tools), "k": pa.array([{"a": 1}])}
    write(tmp_path / "in/a.parquet", pa.table(table))
    told = {"tools_column": "t", "chat_template_kwargs_column": "k"}
    assert passes(job(tmp_path, prompt=told)).columns.prompt == ("k", "prompt", "t")
    assert "prompt.tools_column" in refusal(job(tmp_path, prompt={"tools_column": "k"}))
    wrong = refusal(job(tmp_path, prompt={"chat_template_kwargs_column": "t"}))
    assert "prompt.chat_template_kwargs_column" in wrong
    assert "without column 'missing'" in refusal(job(tmp_path, prompt={"tools_column": "missing"}))


def test_check_int_prompt_in_second_file_is_refused_by_name(tmp_path):
    three_files(tmp_path, {"prompt": [1], "id": [3]})
    assert "b.parquet with column 'prompt' of type int64" in refusal(job(tmp_path))


def test_check_types_that_differ_between_files_are_refused(tmp_path):
    three_files(tmp_path, {"prompt": ["x"], "id": ["3"]})
    line = refusal(job(tmp_path))
    assert line.startswith("input.path: ")
    assert "b.parquet with column 'id' of type string" in line
    assert "int64" in line


def test_check_string_and_null_types_agree_between_files(tmp_path):
    large = pa.array(["z"], pa.large_string())
    three_files(tmp_path, {"prompt": large, "id": pa.nulls(1)})
    schema = passes(job(tmp_path)).columns.schema
    assert schema == pa.schema({"prompt": pa.large_string(), "id": pa.int64()})


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([pa.null(), pa.null()], pa.null()),
        ([pa.null(), pa.int8()], pa.int8()),
        ([pa.string(), pa.string_view()], pa.string()),
        ([pa.string(), pa.dictionary(pa.int8(), pa.string())], pa.string()),
        ([pa.int32(), pa.int64()], None),
        ([pa.int64(), pa.float64()], None),
        ([pa.timestamp("ns"), pa.timestamp("us")], None),
        ([pa.list_(pa.null()), pa.list_(pa.int8())], pa.list_(pa.int8())),
        ([pa.list_(pa.string()), pa.large_list(pa.large_string())], pa.large_list(pa.large_string())),
        ([pa.list_(pa.string()), pa.list_(pa.int8())], None),
        ([pa.struct({"a": pa.null()}), pa.struct({"a": STRUCT})], pa.struct({"a": STRUCT})),
        ([pa.struct({"a": pa.null()}), pa.struct({"b": pa.null()})], None),
        ([pa.list_(pa.int8()), STRUCT], None),
    ],
    ids=str,
)
def test_unified_type_holds_all_or_is_none(kinds, expected):
    assert unified(kinds) == expected
    assert unified(reversed(kinds)) == expected


def test_check_short_form_names_the_prompt_column(tmp_path):
    write(tmp_path / "in/a.parquet", {"body": ["x"], "id": [1]})
    rows = {"path": "in", "columns": {"prompt": "body"}}
    for prompt in ({"format": "chat"}, {"format": "text"}):
        checked = passes(job(tmp_path, input=rows, prompt=prompt))
        assert checked.columns.prompt == ("body",)
        assert checked.template.prompt_column == "body"


def test_check_preset_reads_the_columns_named(tmp_path):
    write(tmp_path / "in/a.parquet", {"question": ["x"], "input": ["y"]})
    rows = {"path": "in", "columns": {"instruction": "question"}}
    assert passes(job(tmp_path, input=rows, prompt={"format": "alpaca"})).columns.prompt == ("input", "question")


def test_check_short_form_that_the_prompt_does_not_read_is_refused(tmp_path):
    write(tmp_path / "in/a.parquet", {"body": ["x"]})
    rows = {"path": "in", "columns": {"prompt": "title"}}
    line = refusal(job(tmp_path, input=rows, prompt={"messages": [{"role": "user", "content": "{body}"}]}))
    assert line.startswith("input.columns.prompt: got 'title'")
    assert "body" in line


def test_check_static_prompt_reads_no_column(tmp_path):
    write(tmp_path / "in/a.parquet", {"id": [1]})
    prompt = {"messages": [{"role": "user", "content": "Tell me a joke."}]}
    checked = passes(job(tmp_path, prompt=prompt, output={"path": "out", "columns": []}))
    assert checked.columns.schema.names == []
