"""Where results may go: not into the input, not where nobody can write."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad.cases import job, write
from ready_jobs import ready_job, refusal

from segue.pipeline.ready.checks import CheckedJob


def passes(path: Path) -> CheckedJob:
    return ready_job(path).checked


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
    path = job(tmp_path, input={"path": source}, output={"path": output})
    assert refusal(path).startswith("output.path: ")


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
    path = job(tmp_path, input={"path": source}, output={"path": output})
    assert passes(path).inputs
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


@pytest.mark.parametrize("output", ["out", "out/below"])
def test_check_output_that_is_a_file_is_refused(tmp_path, output):
    write(tmp_path / "in/a.parquet", {"prompt": ["x"]})
    (tmp_path / "out").write_text("a file")
    line = refusal(job(tmp_path, output={"path": output}))
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
        passes(job(folder, output={"path": "in2"}))  # starts the child as root
        os.seteuid(65534)
        yield folder
        os.seteuid(0)


def test_check_output_that_is_not_writable_is_refused(others_folder):
    path = others_folder / "job.yaml"
    for output in ("out", "out/below"):
        assert "not writable" in refusal(path, f"output.path={output}")
    os.seteuid(0)
    (others_folder / "out").chmod(0o777)
    os.seteuid(65534)
    assert ready_job(path, "output.path=out").checked.inputs
