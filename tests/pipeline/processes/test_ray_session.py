"""The local Ray is private, is started again where a machine is busy, and a cluster's token is asked for."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray

from segue.pipeline.problems import ClusterUnavailable
from segue.pipeline.processes import ray_session

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")


def test_ray_local_session_has_a_private_token_and_refuses_who_lacks_it(local_ray):
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700
    address = ray.get_runtime_context().gcs_address
    script = f"import ray; print(len(ray._raylet.GcsClient(address={address!r}).get_all_node_info(timeout=10)))"
    with_token = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert with_token.stdout.strip() == "1", with_token.stderr
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    for intruder in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        refused = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=without | intruder
        )
        assert refused.returncode != 0, refused.stdout
        assert "auth" in refused.stderr.lower()


@pytest.mark.parametrize(("failures", "starts"), [(1, 2), (5, ray_session.LOCAL_STARTS)])
def test_local_ray_that_a_busy_machine_starts_too_slowly_is_started_again(monkeypatch, failures, starts):
    tried, begun = [], []

    def init(**_):
        tried.append(1)
        if len(tried) <= failures:
            begun.append(subprocess.Popen(["sleep", "60"]))  # a node that comes too late
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray_session.ray, "init", init)
    monkeypatch.setattr(ray_session.ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with nullcontext() if failures < ray_session.LOCAL_STARTS else pytest.raises(ClusterUnavailable, match="timed out"):
        ray_session._start(2)
    assert len(tried) == starts
    assert [process.wait(10) for process in begun[: starts - 1]] == [-signal.SIGKILL] * (starts - 1)
    for process in begun[starts - 1 :]:
        process.kill()
        process.wait()


def test_joining_a_ray_without_a_token_is_warned_of_and_refused_where_it_is_required(monkeypatch, capsys):
    check = ray_session._check_authentication
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check("192.0.2.1:6379")
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("RAY_AUTH_MODE")
    check("192.0.2.1:6379")
    assert "warning: joining Ray at 192.0.2.1:6379 without token" in capsys.readouterr().err
    monkeypatch.setenv(ray_session.REQUIRE_AUTH, "1")
    with pytest.raises(ClusterUnavailable, match="without a token, and SEGUE_REQUIRE_AUTH=1"):
        check("192.0.2.1:6379")
