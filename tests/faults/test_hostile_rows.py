"""What rows must not do to a run: be seen where they are private, make it connect, or change others' answers."""

import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad.rows import CHAT
from echo_jobs import LOCATIONS, outcome, segue_process, wait_for, write_job
from in_process import run, run_here, without_ray

PRIVATE = "PRIVATE0MARKER"


@pytest.fixture
def scratch(monkeypatch):
    """Where a command and its Ray put temporary files. Short: Ray has sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="sg", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def files_with(folder: Path, words: list[bytes]) -> list[tuple[str, bytes]]:
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [(str(path.relative_to(folder)), word) for word in words if word in content]
    return found


def tokens_in(folder: Path) -> list[bytes]:
    """Of Rays that were started with their files there."""
    return [path.read_bytes() for path in folder.rglob("ray-token") if path.stat().st_size == 64]


def private_rows(folder: Path) -> pa.Table:
    prompts = [f"{PRIVATE} {n}" for n in range(40)]
    prompts[7] = PRIVATE * 20_000  # too long
    parameters = [None if n % 5 else f'{{"max_tokens": "{PRIVATE}"}}' for n in range(40)]
    return pa.table({"prompt": prompts, "sampling_params": parameters})


def test_neither_credentials_nor_the_ray_token_nor_prompts_are_written_where_they_do_not_belong(
    bucket,
    proxy,
    scratch,
    tmp_path,
):
    pq.write_table(private_rows(tmp_path), tmp_path / "in.parquet")
    bucket.rm("data/in", recursive=True)
    bucket.put_file(str(tmp_path / "in.parquet"), "data/in/a.parquet")
    columns = LOCATIONS["output"] | {"columns": []}
    limits = {"max_model_len": 2000, "max_error_rate": 1.0}
    job = write_job(
        tmp_path, model={"source": "echo?crash=NOWHERE"}, **(LOCATIONS | {"output": columns, "limits": limits})
    )
    with segue_process(tmp_path, "run", str(job)) as process:
        wait_for(lambda: tokens_in(scratch), process)
        tokens = tokens_in(scratch)
        code, out, err = outcome(process)
    assert code == 0, err
    assert len(tokens) == 1
    secrets = [*tokens, os.environ["AWS_ACCESS_KEY_ID"].encode(), os.environ["AWS_SECRET_ACCESS_KEY"].encode()]
    logs = list(scratch.rglob("*.log"))
    assert len(logs) > 5, "Ray's session folder is there"
    assert files_with(scratch, [*secrets, PRIVATE.encode()]) == []
    bucket.get("data/out", str(tmp_path / "got"), recursive=True)
    assert (tmp_path / "got" / "_job" / "manifest.json").is_file()
    assert files_with(tmp_path / "got", secrets) == []
    assert files_with(tmp_path / "got" / "_job" / "runs", [PRIVATE.encode()]) == []
    assert PRIVATE.encode() not in (tmp_path / "got" / "_job" / "manifest.json").read_bytes()
    assert [word for word in [*secrets, PRIVATE.encode()] if word in (out + err).encode()] == []


def test_nothing_connects_to_what_rows_name(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/x.png"
        contents = [
            [{"type": "text", "text": f"see {url} and file:///etc/passwd"}],
            [{"type": "image_url", "image_url": {"url": url}}],
            [
                {"type": "text", "text": f'<img src="{url}">![x]({url})'},
                {"type": "image_url", "image_url": {"url": url}},
            ],
            [{"type": "input_audio", "text": url}],
            [{"type": "file", "text": url}],
        ] * 20
        part = pa.struct(
            [("type", pa.string()), ("text", pa.string()), ("image_url", pa.struct([("url", pa.string())]))]
        )
        kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))
        rows = [[{"role": "user", "content": content}] for content in contents]
        (tmp_path / "in").mkdir()
        pq.write_table(pa.table({"messages": pa.array(rows, kind)}), tmp_path / "in" / "a.parquet")
        job = write_job(tmp_path, prompt={"chat_template": CHAT}, limits={"max_error_rate": 1.0})
        with without_ray():
            summary = run(job)
        assert summary.errors == {"UNSUPPORTED_CONTENT": 80}
        with pytest.raises(TimeoutError):
            listening.accept()


def test_row_error_among_a_thousand_rows_leaves_all_others_bit_equal(tmp_path, model_directory):
    """The same rows without it, which are the same requests in the same order."""
    prompts = [f"{'abc'[n % 3] * 30} number {n}" for n in range(1000)]
    shares: dict[str, Any] = {
        "output": {"path": "out", "columns": ["id"], "max_rows_per_file": 1000},
        "model": {"source": model_directory, "dtype": "float32"},
    }
    got = []
    for name, spoiled in (("with", True), ("without", False)):
        (folder := tmp_path / name / "in").mkdir(parents=True)
        table = pa.table({"prompt": prompts, "id": range(1000)})
        if spoiled:
            table = table.set_column(0, "prompt", [[None if n == 500 else prompt for n, prompt in enumerate(prompts)]])
        else:
            table = table.filter(pa.array([n != 500 for n in range(1000)]))
        pq.write_table(table, folder / "a.parquet")
        job = write_job(
            tmp_path / name, prompt={"format": "text", "text": "{prompt}"},
            sampling_params={"max_tokens": 4, "logprobs": 2}, **shares,
        )  # fmt: skip
        assert run_here(job).errors == ({"NULL_PROMPT": 1} if spoiled else {})
        rows = pq.read_table(tmp_path / name / "out").select(["id", "generated_text", "logprobs", "error"]).to_pylist()
        got.append({row["id"]: (row["generated_text"], row["logprobs"]) for row in rows if row["error"] is None})
    assert len(got[0]) == 999
    assert got[0] == got[1]
