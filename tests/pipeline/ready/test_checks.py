"""What a job is refused for before any work."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_servers import S3_ENVIRONMENT

from segue.pipeline.dataset.columns import unified
from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.ledger.columns import RESULT_COLUMNS
from segue.pipeline.problems import JobRefused, Problem
from segue.pipeline.ready.checks import CheckedJob, check_job, check_job_file

STRUCT = pa.struct({"role": pa.string(), "content": pa.string()})


def job(folder: Path, **sections: object) -> JobConfig:
    """A job over `folder`/in, with other sections on top."""
    config = {
        "name": "job",
        "model": {"source": "echo"},
        "input": {"path": str(folder / "in")},
        "output": {"path": str(folder / "out")},
    }
    return JobConfig.model_validate(config | sections)


def write(path: Path, table: pa.Table | dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path)
    return path


def three_files(folder: Path, second: dict[str, object]) -> None:
    for name, table in (("a", {"prompt": ["x"], "id": [1]}), ("b", second), ("c", {"prompt": ["y"], "id": [2]})):
        write(folder / f"in/{name}.parquet", table)


def refusals(config: JobConfig, **options: object) -> list[str]:
    with pytest.raises(JobRefused) as refused:
        check_job(config, **options)  # type: ignore[arg-type]
    lines = str(refused.value).splitlines()
    assert len(lines) == len(refused.value.problems), "a problem takes more than one line"
    return lines


def refusal(config: JobConfig, **options: object) -> str:
    lines = refusals(config, **options)
    assert len(lines) == 1, lines
    return lines[0]


def passes(config: JobConfig) -> CheckedJob:
    return check_job(config)


def test_check_good_job_has_inputs_and_columns(tmp_path):
    three_files(tmp_path, {"prompt": ["z"], "id": [3]})
    checked = passes(job(tmp_path, output={"path": str(tmp_path / "out"), "columns": ["id"]}))
    assert [file.src_path for file in checked.inputs] == ["a.parquet", "b.parquet", "c.parquet"]
    assert (checked.columns.prompt, checked.columns.passed) == (("prompt",), ("id",))
    assert checked.columns.schema == pa.schema({"prompt": pa.string(), "id": pa.int64()})


def test_check_columns_that_nobody_asked_for_are_not_read(tmp_path):
    write(tmp_path / "in/a.parquet", {"prompt": ["x"], "blob": [b"x"], "id": [1]})
    sections = {"output": {"path": str(tmp_path / "out"), "columns": []}}
    assert passes(job(tmp_path, **sections)).columns.schema.names == ["prompt"]


def test_check_column_missing_in_second_of_three_files_is_named(tmp_path):
    three_files(tmp_path, {"promt": ["z"], "id": [3]})
    line = refusal(job(tmp_path, output={"path": str(tmp_path / "out"), "columns": ["id"]}))
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
    assert passes(job(tmp_path, output={"path": str(tmp_path / "out"), "columns": ["prompt"]})).inputs


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
    [pa.string(), STRUCT, pa.list_(pa.string()), pa.list_(pa.struct({"role": pa.string()}))],
    ids=str,
)
def test_check_messages_of_other_type_are_refused(tmp_path, kind):
    write(tmp_path / "in/a.parquet", pa.table({"messages": pa.array([None], kind), "id": [1]}))
    assert "list<struct<role: string, content: string>>" in refusal(job(tmp_path))


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
    rows = {"path": str(tmp_path / "in"), "columns": {"prompt": "body"}}
    for prompt in ({"format": "chat"}, {"format": "text"}):
        checked = passes(job(tmp_path, input=rows, prompt=prompt))
        assert checked.columns.prompt == ("body",)
        assert checked.template.prompt_column == "body"


def test_check_preset_reads_the_columns_named(tmp_path):
    write(tmp_path / "in/a.parquet", {"question": ["x"], "input": ["y"]})
    rows = {"path": str(tmp_path / "in"), "columns": {"instruction": "question"}}
    assert passes(job(tmp_path, input=rows, prompt={"format": "alpaca"})).columns.prompt == ("input", "question")


def test_check_short_form_that_the_prompt_does_not_read_is_refused(tmp_path):
    write(tmp_path / "in/a.parquet", {"body": ["x"]})
    rows = {"path": str(tmp_path / "in"), "columns": {"prompt": "title"}}
    line = refusal(job(tmp_path, input=rows, prompt={"messages": [{"role": "user", "content": "{body}"}]}))
    assert line.startswith("input.columns.prompt: got 'title'")
    assert "body" in line


def test_check_missing_input_is_named(tmp_path):
    assert refusal(job(tmp_path)).startswith("input.path: got ")


def test_check_no_rows_is_a_valid_job(tmp_path):
    write(tmp_path / "in/a.parquet", pa.table({"prompt": pa.array([], pa.string())}))
    assert passes(job(tmp_path)).inputs[0].num_rows == 0


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("in", "in"),
        ("in", "in/out"),
        ("in", "link/out"),
        ("in", "."),
        ("in/sub/a.parquet", "in/sub"),
        ("in/sub/a.parquet", "in"),
        ("in/**/*.parquet", "in/out"),
        ("in/*/*.parquet", "in/out"),
        ("link/*/*.parquet", "in/out"),
        ("in/sub/*", "in/sub"),
    ],
)
def test_check_output_that_meets_the_input_is_refused(tmp_path, source, output):
    write(tmp_path / "in/sub/a.parquet", {"prompt": ["x"]})
    (tmp_path / "link").symlink_to("in")
    config = job(tmp_path, input={"path": str(tmp_path / source)}, output={"path": str(tmp_path / output)})
    assert refusal(config).startswith("output.path: ")


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("in", "in2"),
        ("in", "deep/er/out"),
        ("in/sub/a.parquet", "in/sub/out"),
        ("in/sub/a.parquet", "in/out"),
        ("in/sub/*.parquet", "in/sub/out"),
        ("in/*/*.parquet", "in/x/out"),
    ],
)
def test_check_output_beside_the_input_passes(tmp_path, source, output):
    write(tmp_path / "in/sub/a.parquet", {"prompt": ["x"]})
    config = job(tmp_path, input={"path": str(tmp_path / source)}, output={"path": str(tmp_path / output)})
    assert passes(config).inputs
    assert not (tmp_path / "deep").exists(), "checking must not make the folder"


@pytest.mark.parametrize("output", ["s3://bucket/out", "S3://bucket/out"])
def test_check_output_in_a_store_is_refused_without_credentials(tmp_path, monkeypatch, output):
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()  # one of them may have been made with another test's credentials
    write(tmp_path / "in/a.parquet", {"prompt": ["x"]})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    found = refusal(job(tmp_path, output={"path": output}))
    assert "output.path: got s3://bucket/out/: NoCredentialsError" in found
    assert "wanted a bucket that can be listed" in found


@pytest.mark.parametrize("output", ["file:///out", "gs://bucket/out"])
def test_check_output_elsewhere_is_refused(tmp_path, output):
    with pytest.raises((JobRefused, ValueError)) as refused:
        check_job(job(tmp_path, output={"path": output}))
    assert "s3://" in str(refused.value)


@pytest.mark.parametrize("output", ["out", "out/below"])
def test_check_output_that_is_a_file_is_refused(tmp_path, output):
    write(tmp_path / "in/a.parquet", {"prompt": ["x"]})
    (tmp_path / "out").write_text("a file")
    line = refusal(job(tmp_path, output={"path": str(tmp_path / output)}))
    assert line.startswith("output.path: ")
    assert "which is a file" in line


@pytest.fixture
def others_folder() -> Iterator[Path]:
    """A folder of root's, seen as another user: root itself may write anywhere."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a folder of another user's")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "in/a.parquet", {"prompt": ["x"]})
        (folder / "out").mkdir()
        for path in (folder, folder / "in"):
            path.chmod(0o755)
        os.seteuid(65534)
        yield folder
        os.seteuid(0)


def test_check_output_that_is_not_writable_is_refused(others_folder):
    for output in ("out", "out/below"):
        line = refusal(job(others_folder, output={"path": str(others_folder / output)}))
        assert "not writable" in line
    os.seteuid(0)
    (others_folder / "out").chmod(0o777)
    os.seteuid(65534)
    assert passes(job(others_folder)).inputs


@pytest.mark.parametrize(
    ("num_gpus", "has_gpu", "is_fine"),
    [("auto", False, False), ("auto", True, True), (0, True, False), (1, False, True), (0.5, False, True)],
)
def test_check_float16_needs_a_gpu(tmp_path, num_gpus, has_gpu, is_fine):
    write(tmp_path / "in/a.parquet", {"prompt": ["x"]})
    config = job(tmp_path, model={"source": "echo", "dtype": "float16"}, workers={"num_gpus": num_gpus})
    if is_fine:
        assert check_job(config, has_gpu=has_gpu).inputs
    else:
        assert refusal(config, has_gpu=has_gpu).startswith("model.dtype: ")


def test_check_adds_the_problems_of_others(tmp_path):
    lines = refusals(job(tmp_path), others=[Problem("model.source", "'x'", "a model")])
    assert [line.split(": ")[0] for line in lines] == ["model.source", "input.path"]


def test_check_file_lists_mistakes_of_the_file_and_of_the_data_at_once(tmp_path):
    write(tmp_path / "in/a.parquet", {"prompt": ["x"], "error": ["e"]})
    write(tmp_path / "in/b.parquet", {"Prompt": ["x"], "error": ["e"]})
    (tmp_path / "in/c.parquet").touch()
    file = tmp_path / "job.yaml"
    text = "name: a/b\nmodel: {sorce: echo}\nmodel: {}\ninput: {path: in}\noutput: {path: in/out}\nmask: 1\n"
    file.write_text(text)

    def keys() -> list[str]:
        with pytest.raises(JobRefused) as refused:
            check_job_file(file, ["seed=x"])
        return [str(problem).split(" got ")[0] for problem in refused.value.problems]

    common = [
        "job.yaml:3: model:",
        "job.yaml:1: name:",
        "job.yaml:2: model.source:",
        "job.yaml:2: model.sorce:",
        "job.yaml:6: mask:",
        "--set: seed:",
    ]
    assert keys() == [*common, "job.yaml:4: input.path:", "job.yaml:5: output.path:"]
    (tmp_path / "in/c.parquet").unlink()
    columns = ["job.yaml:5: output.columns:", "job.yaml: prompt:", "job.yaml:5: output.columns:"]
    assert keys() == [*common, *columns, "job.yaml:5: output.path:"]


def test_check_static_prompt_reads_no_column(tmp_path):
    write(tmp_path / "in/a.parquet", {"id": [1]})
    prompt = {"messages": [{"role": "user", "content": "Tell me a joke."}]}
    checked = passes(job(tmp_path, prompt=prompt, output={"path": str(tmp_path / "out"), "columns": []}))
    assert checked.columns.schema.names == []


def test_check_file_that_is_right_gives_the_job(tmp_path):
    write(tmp_path / "in/a.parquet", {"body": ["x"]})
    file = tmp_path / "job.yaml"
    file.write_text("name: a\nmodel: {source: echo}\ninput: {path: in, columns: {prompt: body}}\noutput: {path: out}\n")
    checked = check_job_file(file, ["input.limit=1"])
    assert checked.config.input.limit == 1
    assert checked.columns.prompt == ("body",)
    assert checked.template.prompt_column == "body"


@pytest.mark.parametrize(
    ("endpoint", "is_refused"),
    [
        ("http://192.0.2.1:9000", True),
        ("http://[2001:db8::1]:9", True),
        ("https://192.0.2.1", False),
        ("http://127.0.0.1:1", False),
        ("http://localhost:1", False),
    ],
)
def test_endpoint_in_the_clear_is_refused_unless_it_is_this_machines(monkeypatch, endpoint, is_refused):
    from s3fs import S3FileSystem

    from segue.pipeline.storage.remote import ALLOW_HTTP, InsecureEndpoint, open_remote
    from segue.pipeline.storage.store import OutputStorageError, open_store

    S3FileSystem.clear_instance_cache()
    for name, value in (S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint}).items():
        monkeypatch.setenv(name, value)
    if is_refused:
        with pytest.raises(InsecureEndpoint, match=r"is not encrypted, wanted https://"):
            open_remote("s3://bucket/x")
        with pytest.raises(OutputStorageError, match=r"s3://bucket/out: the S3 endpoint .* is not encrypted"):
            open_store("s3://bucket/out").names()
        monkeypatch.setenv(ALLOW_HTTP, "1")
    assert open_remote("s3://bucket/x")[1] == "bucket/x"
    S3FileSystem.clear_instance_cache()
