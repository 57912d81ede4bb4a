"""Every file of infra/ against the schema of who reads it: a field that does not exist fails here, not on a cluster."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from fsspec.utils import glob_translate
from local_cluster import SCRIPT
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERAY = ROOT.parent / "shared" / "data" / "kuberay-crds"
OWN_KINDS = ("RayJob", "RayCluster")
PACKAGES = ("attention", "workers", "pipeline", "jobs")
TOOLS = Path(sys.executable).parent


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in YAML(typ="safe", pure=True).load_all(path.read_text()) if document]


KUBERNETES = [(path, doc) for path in sorted((INFRA / "kuberay").glob("*.yaml")) for doc in documents(path)]
RAY_KINDS = [(path, doc) for path, doc in KUBERNETES if doc["kind"] in OWN_KINDS]


def closed(schema: Any) -> Any:
    """The schema, in which no object has fields that it does not name, as Kubernetes with strict validation has it."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not is_open:
        found["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        found = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    return found


def kuberay_validator(kind: str) -> jsonschema.Draft202012Validator:
    path = KUBERAY / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's schemas are not beside the repository: {path}")
    definition = yaml.load(path.read_text(), yaml.CSafeLoader)  # a megabyte: ruamel takes seconds
    (served,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema = closed(served["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize(("path", "doc"), RAY_KINDS, ids=[path.name for path, _ in RAY_KINDS])
def test_kuberay_resources_are_what_the_operator_knows(path, doc):
    validator = kuberay_validator(doc["kind"])
    validator.validate(doc)
    worse = copy.deepcopy(doc)
    cluster = worse["spec"].get("rayClusterSpec", worse["spec"])
    cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
        validator.validate(worse)


@pytest.mark.parametrize(
    "doc", [doc for _, doc in KUBERNETES if doc["kind"] not in OWN_KINDS], ids=lambda doc: doc["kind"]
)
def test_kubernetes_resources_are_what_kubernetes_knows(doc):
    kubernetes_validate.validate(doc, "1.33", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(doc | {"specs": {}}, "1.33", strict=True)


@pytest.mark.parametrize(("path", "doc"), RAY_KINDS, ids=[path.name for path, _ in RAY_KINDS])
def test_kuberay_clusters_are_safe_and_give_back_what_they_do_not_use(path, doc):
    cluster = doc["spec"].get("rayClusterSpec", doc["spec"])
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == pinned("ray")
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["template"]["spec"]["automountServiceAccountToken"]  # else the autoscaler cannot ask for pods
    groups = cluster["workerGroupSpecs"]
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in groups)
    pods = [cluster["headGroupSpec"]["template"], *(group["template"] for group in groups)]
    if doc["kind"] == "RayJob":
        assert doc["spec"]["submitterConfig"] == {"backoffLimit": 0}
        pods.append(doc["spec"]["submitterPodTemplate"])
        rules = doc["spec"]["deletionStrategy"]["deletionRules"]
        # With autoscaling the operator refuses DeleteWorkers (validateDeletionRules), which no schema says.
        assert {rule["policy"] for rule in rules} == {"DeleteCluster"}
        ends = [next(iter(rule["condition"].items())) for rule in rules]
        assert set(ends) == {("jobStatus", "SUCCEEDED"), ("jobStatus", "FAILED"), ("jobDeploymentStatus", "Failed")}
        # The operator refuses both ways of cleaning up at once.
        assert not doc["spec"].keys() & {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
    for pod in pods:
        assert pod["metadata"]["labels"] == {"app": "segue"}  # what the network policy lets in
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        for container in pod["spec"]["containers"]:
            assert container["image"].startswith(f"segue:{version('segue')}")
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
            assert mounts <= {volume["name"] for volume in pod["spec"].get("volumes", ())}
    for pod in pods[:3]:
        assert {"name": "shm", "mountPath": "/dev/shm"} in pod["spec"]["containers"][0]["volumeMounts"]


def test_kuberay_policy_lets_only_the_cluster_and_its_operator_in():
    (policy,) = [doc for _, doc in KUBERNETES if doc["kind"] == "NetworkPolicy"]
    assert policy["spec"]["podSelector"] == {"matchLabels": {"app": "segue"}}
    unlimited = [rule for rule in policy["spec"]["ingress"] if "ports" not in rule]
    assert [rule["from"] for rule in unlimited] == [[{"podSelector": {"matchLabels": {"app": "segue"}}}]]


def test_kuberay_job_in_the_config_map_is_valid(proxy, tmp_path, model_directory, monkeypatch):
    """Against a bucket of its name, over HTTP; with a model that is there."""
    (config,) = [doc for _, doc in KUBERNETES if doc["kind"] == "ConfigMap"]
    ((name, text),) = config["data"].items()
    (entrypoint,) = [doc["spec"]["entrypoint"] for _, doc in KUBERNETES if doc["kind"] == "RayJob"]
    assert entrypoint == f"segue run /etc/segue/{name}"
    (tmp_path / name).write_text(text)
    from s3fs import S3FileSystem

    files = S3FileSystem(skip_instance_cache=True)
    for bucket in set(re.findall(r"s3://([^/]+)/", text)):
        files.mkdir(bucket)
    table = pa.table({"article": ["How to log in."], "ticket": ["I cannot log in."]})
    with files.open("DATASETS/tickets/a.parquet", "wb") as file:
        pq.write_table(table, file)
    here = ["--set", f"model.source={model_directory}", "--set", "workers.num_gpus=0"]
    done = subprocess.run(
        [sys.executable, "-m", "segue.jobs.cli", "validate", tmp_path / name, *here],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == 1


def test_aws_cluster_is_what_the_launcher_knows():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    (config,) = documents(INFRA / "aws" / "cluster.yaml")
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"maximum_workers": 8}, schema)
    assert config["head_node_type"] in config["available_node_types"]
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert any(f"segue-{version('segue')}-py3" in name for name in config["file_mounts"])


def test_dockerfile_passes_hadolint_and_copies_what_there_is():
    file = INFRA / "docker" / "Dockerfile"
    done = subprocess.run([TOOLS / "hadolint", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = file.read_text()
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for name in line.split()]
    assert {"segue", "attention", "workers", "pipeline", "jobs", "constraints.txt"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    ignore = (INFRA / "docker" / "Dockerfile.dockerignore").read_text()
    kept = re.findall(r"^!(.+)$", ignore, re.MULTILINE)
    assert sorted(kept) == sorted(copied)
    ignored = [line for line in ignore.splitlines() if line and line[0] not in "#!" and line != "*"]
    code = [path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    code = [path for path in code if "__pycache__" not in path.parts and "out" not in path.parts]
    parts = [(path, str(part)) for path in code for part in (path, *path.parents[:-1])]
    lost = [path for path, part in parts for pattern in ignored if re.match(glob_translate(pattern), part)]
    assert lost == []
    assert re.search(r"^USER 1000$", text, re.MULTILINE)
    assert f"segue:{version('segue')}" in text


@pytest.mark.parametrize(
    "script",
    [*sorted(INFRA.rglob("*.sh")), *sorted(INFRA.rglob("*.sbatch")), ROOT / ".ci" / "run"],
    ids=lambda p: p.name,
)
def test_shell_passes_shellcheck(script):
    done = subprocess.run([TOOLS / "shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


def test_local_cluster_script_explains_itself():
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert [word for word in ("up", "add", "kill", "down") if f"cluster.sh {word} " not in done.stderr] == []


@pytest.mark.long
def test_slurm_script_runs_a_job_and_leaves_no_token(tmp_path):
    """With stand-ins for the two commands of Slurm that it calls, on one node."""
    from echo_jobs import NUM_ROWS, rows_of, write_input, write_job

    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    (tools / "srun").write_text(
        '#!/usr/bin/env bash\n[ "$1" = --kill-on-bad-exit=0 ] || exit 9\nshift 2\nexport SLURM_NODEID=0\nexec "$@"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    job = write_job(write_input(tmp_path))
    number = os.getpid()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "VENV": str(TOOLS.parent),
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    try:
        done = subprocess.run(
            ["bash", INFRA / "slurm" / "segue.sbatch", job, "--limit", "20"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout
        assert len(rows_of(tmp_path / "out")) == 20 < NUM_ROWS
        assert not list(tmp_path.glob(".segue-*"))
        assert not [p for p in psutil.process_iter(["cmdline"]) if f"ray-{number}" in " ".join(p.info["cmdline"] or ())]
    finally:
        shutil.rmtree(f"/tmp/ray-{number}", ignore_errors=True)


def pinned(name: str) -> str:
    found = re.search(rf"^{name}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]
