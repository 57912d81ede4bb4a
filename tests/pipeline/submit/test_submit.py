"""Jobs handed to a cluster of three nodes over HTTP, by a client that has its address and its token."""

import json
import shutil
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from echo_jobs import NUM_ROWS, origins, rows_of, shards_in, wait_for, write_input, write_job
from hypothesis import given
from hypothesis import strategies as st
from local_cluster import LocalCluster, local_cluster
from ready_jobs import config_of

from segue.pipeline.problems import JobRefused
from segue.pipeline.submit.job_queue import LogLines
from segue.pipeline.submit.submission import copied_package, read_runtime_env, read_submitted

ROOT = Path(__file__).parents[3]
TRIAGE = ROOT / "jobs" / "examples" / "triage" / "job.yaml"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with local_cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found


def result_of(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


@pytest.mark.long
def test_submit_example_while_a_node_vanishes_completes_and_status_is_right_throughout(tmp_path):
    with local_cluster(tmp_path / "cluster") as cluster:
        out = tmp_path / "out"
        run = cluster.segue(
            "submit", TRIAGE, "--limit", "120", "--output", out, "--wait",
            "--set", "workers.min_size=1", "--set", "workers.max_size=2", "--set", "output.max_rows_per_file=16",
        )  # fmt: skip
        wait_for(lambda: len(shards_in(out)) >= 2, run)
        code, told, _ = cluster.ended("status", out)
        assert code == 0
        assert result_of(told)["status"] == "running"
        assert result_of(told)["rows"] == 120
        cluster.kill_node(2)
        told, log = run.communicate(timeout=500)
        assert run.returncode == 0, log
        result = result_of(told)
        assert result["status"] == "SUCCEEDED"
        assert result["result"]["rows"] == 120
        assert result["result"]["num_errors"] == 0
        assert "planning 120 rows" in log
        assert len(rows_of(out)) == 120
        assert all(row["generated_text"] for row in rows_of(out).values())
        code, told, _ = cluster.ended("status", out)
        assert result_of(told)["status"] == "done"
        assert result_of(told)["rows_done"] == 120
        code, told, _ = cluster.ended("logs", result["submission_id"])
        assert code == 0
        assert json.loads(told.splitlines()[-1])["rows"] == 120


@pytest.mark.long
def test_submit_cancelled_job_keeps_what_is_committed_and_goes_on_when_submitted_again(cluster, tmp_path):
    path = write_job(
        write_input(tmp_path, 90),
        model={"source": "echo:1.5"},
        workers={"units_in_flight": 1},
        output={"path": "out", "max_rows_per_file": 8},
    )
    code, told, err = cluster.ended("submit", path)
    assert code == 0, err
    first = result_of(told)
    assert first["is_new"]
    assert first["submission_id"].startswith("segue-job-")
    follower = cluster.segue("logs", first["submission_id"], "--follow")
    wait_for(lambda: len(shards_in(tmp_path / "out")) >= 1, follower)
    code, told, _ = cluster.ended("submit", path)
    assert result_of(told) == first | {"is_new": False}
    code, told, err = cluster.ended("cancel", first["submission_id"])
    assert code == 0, err
    assert result_of(told)["status"] == "STOPPED"
    follower.communicate(timeout=60)
    assert follower.returncode == 128 + signal.SIGTERM
    before = {shard.name: shard.stat().st_mtime_ns for shard in shards_in(tmp_path / "out")}
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    code, told, log = cluster.ended("submit", path, "--wait")
    assert code == 0, log
    assert result_of(told)["submission_id"] == first["submission_id"] + "-2"
    assert f"resuming: {len(before)} of" in log
    assert rows_of(tmp_path / "out").keys() == origins(90)
    after = {shard.name: shard.stat().st_mtime_ns for shard in shards_in(tmp_path / "out")}
    assert before.items() <= after.items()


def test_submit_job_that_the_cluster_refuses_exits_as_it_does(cluster, tmp_path):
    path = write_job(tmp_path, input={"path": "nowhere"})
    code, told, log = cluster.ended("submit", path, "--wait")
    assert code == 2, log
    assert "nowhere" in log
    assert result_of(told)["status"] == "FAILED"
    assert result_of(told)["exit_code"] == 2


def test_submit_with_code_runs_the_code_of_the_client(cluster, tmp_path):
    changed = tmp_path / "checkout"
    shutil.copytree(ROOT / "segue", changed / "segue", ignore=shutil.ignore_patterns("__pycache__", "examples"))
    planning = changed / "segue" / "pipeline" / "plan" / "windows.py"
    text = planning.read_text()
    assert 'f"planning ' in text
    planning.write_text(text.replace('f"planning ', 'f"CHANGED planning '))
    path = write_job(write_input(tmp_path))
    code, _, log = cluster.ended("submit", path, "--wait", "--with-code", PYTHONPATH=str(changed))
    assert code == 0, log
    assert f"CHANGED planning {NUM_ROWS} rows" in log
    assert len(rows_of(tmp_path / "out")) == NUM_ROWS


def test_submit_sends_every_module_source_and_template_and_no_example(tmp_path):
    sent = Path(copied_package(tmp_path))
    found = {path.relative_to(sent) for path in sent.rglob("*") if path.is_file()}
    wanted = {path for name in ("attention", "workers", "pipeline", "jobs") for path in (ROOT / name).rglob("*.py")}
    wanted |= {*(ROOT / "attention/cpu/cpp").iterdir(), *(ROOT / "jobs/templates").iterdir()}
    ours = {path.relative_to(ROOT) for path in wanted if not path.is_relative_to(ROOT / "jobs/examples")}
    assert found == ours | {Path("__init__.py"), Path("__main__.py")}


@pytest.mark.parametrize(
    ("variables", "address", "said"),
    [
        ({"RAY_AUTH_TOKEN_PATH": ""}, None, "got no token, wanted the cluster's"),
        ({"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 64}, None, "got another token, wanted the cluster's"),
        ({}, "http://127.0.0.1:9", "http://127.0.0.1:9"),
        ({}, "127.0.0.1:6379", "wanted http://HOST:PORT"),
        ({}, "http://me:word@127.0.0.1:9", "wanted a URL without credentials"),
    ],
)
def test_submit_cluster_that_cannot_be_used_exits_4_and_says_why(cluster, tmp_path, variables, address, said):
    path = write_job(write_input(tmp_path))
    variables |= {"HOME": str(tmp_path)}  # where Ray's own token may be
    code, out, err = cluster.ended("submit", path, "--address", address or cluster.address, **variables)
    assert code == 4, err
    assert out == ""
    assert said in err
    assert "word@" not in err


def test_submit_without_a_token_that_is_required_is_refused(cluster, tmp_path):
    path = write_job(write_input(tmp_path))
    code, _, err = cluster.ended("submit", path, "--require-auth", RAY_AUTH_TOKEN_PATH="", HOME=str(tmp_path))
    assert code == 4
    assert "set RAY_AUTH_TOKEN" in err


class HeadComingUp(BaseHTTPRequestHandler):
    """A head whose agent comes up while the third submission is made."""

    num_refused = 0

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content, status = b'{"version": "4", "ray_version": "2", "ray_commit": "", "session_name": ""}', 200
        if self.path == "/api/jobs/" and self.command == "GET":
            content = b"[]"
        elif self.path == "/api/jobs/":
            content = b'{"job_id": "1", "submission_id": "one"}'
            if HeadComingUp.num_refused < 2:
                HeadComingUp.num_refused += 1
                content, status = b"No available agent to submit job, please try again later.", 500
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = answer

    def log_message(self, *_):
        pass


def test_submit_to_a_head_that_is_coming_up_waits_for_its_agent(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), HeadComingUp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        head = LocalCluster(tmp_path, {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{server.server_port}"})
        code, out, err = head.ended("submit", write_job(write_input(tmp_path)))
        server.shutdown()
    assert code == 0, err
    assert result_of(out)["is_new"]
    assert HeadComingUp.num_refused == 2


def test_submit_bad_job_file_is_refused_before_the_cluster_is_asked(tmp_path):
    nobody = LocalCluster(tmp_path, {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9", "PATH": "/usr/bin"})
    path = write_job(write_input(tmp_path), task="dream", sampling_params={"max_tokens": -1})
    code, _, err = nobody.ended("submit", path)
    assert code == 2
    assert "task" in err
    assert "sampling_params.max_tokens" in err


def test_submit_logs_of_nobody_exits_4(cluster):
    for more in ([], ["--follow"]):
        code, _, err = cluster.ended("logs", "segue-nobody", *more)
        assert code == 4
        assert "segue-nobody" in err


@given(st.text(alphabet="ab\n", max_size=30), st.lists(st.integers(0, 30), max_size=6))
def test_log_that_is_read_again_from_its_beginning_repeats_no_line(log, breaks):
    """Each connection sends the log anew, and may break anywhere."""
    said: list[str] = []
    lines = LogLines(said.append)
    for end in breaks:
        for start in range(0, min(end, len(log)), 4):
            lines.take(start, log[start : min(start + 4, end)])
    lines.take_all(log)
    lines.flush()
    assert said == log.removesuffix("\n").split("\n") if log else said == []


def test_submitted_job_is_the_job_with_its_prompt_files_and_paths(tmp_path):
    (tmp_path / "system.md").write_text("Be {kind}.\x85 \u2028 \x7f 😀 é", encoding="utf-8")
    messages = [{"role": "system", "content_file": "system.md"}, {"role": "user", "content": "{prompt}"}]
    path = write_job(tmp_path, prompt={"messages": messages})
    there = tmp_path / "elsewhere"
    there.mkdir()
    submitted = read_submitted(path, ["sampling_params.max_tokens=9"])
    (there / "job.json").write_bytes(submitted.content)
    found = config_of(there / "job.json")
    assert found == config_of(path, "sampling_params.max_tokens=9")
    assert "Be {kind}." in str(found.prompt)
    assert submitted.local_paths == (str(tmp_path / "in"), str(tmp_path / "out"))
    assert read_submitted(path).submission_id != submitted.submission_id
    assert submitted.metadata.keys() == {"segue_job", "segue_output", "segue_version"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("env_vars: {AWS_SECRET_ACCESS_KEY: x}", "AWS_SECRET_ACCESS_KEY"),
        ("env_vars: {HF_TOKEN: x}", "HF_TOKEN"),
        ("working_dir: .", "working_dir"),
        ("- pip", "a mapping"),
        ("env_vars: [A]", "env_vars"),
        ("pip: ['--extra-index-url https://me:word@host/simple']", "a URL with credentials"),
    ],
)
def test_runtime_env_with_secrets_or_another_folder_is_refused(tmp_path, text, said):
    (tmp_path / "env.yaml").write_text(text)
    with pytest.raises(JobRefused, match=said):
        read_runtime_env(str(tmp_path / "env.yaml"))


def test_runtime_env_without_secrets_is_taken_as_it_is(tmp_path):
    (tmp_path / "env.yaml").write_text("pip: [segue==0.1]\nenv_vars: {OMP_NUM_THREADS: '1'}\n")
    wanted = {"pip": ["segue==0.1"], "env_vars": {"OMP_NUM_THREADS": "1"}}
    assert read_runtime_env(str(tmp_path / "env.yaml")) == wanted
