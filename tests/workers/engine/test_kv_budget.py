"""How much memory there is for keys and values: measured, within the limits of control groups."""

from pathlib import Path

import psutil
import pytest
from echo_jobs import write_input, write_job
from ready_jobs import ready_job
from tiny_engines import memory_of
from tiny_models import tiny_tree_model

from segue.attention.segments import Segment
from segue.pipeline.jobfile.schema import WorkersConfig
from segue.pipeline.processes.reservation import threads_of, workers_a_node
from segue.workers.devices import devices, memory
from segue.workers.engine import runner
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.errors import RowErrorCode
from segue.workers.rows.params import SamplingParams

V1 = {"memory.limit_in_bytes": "1000\n", "memory.usage_in_bytes": "700\n", "memory.stat": "total_inactive_file 50\n"}
V2 = {"memory.max": "900\n", "memory.current": "800\n", "memory.stat": "anon 5\ninactive_file 50\n"}
UNLIMITED = {"memory.max": "max\n", "memory.current": "800\n", "memory.stat": "inactive_file 50\n"}


@pytest.mark.parametrize(
    ("own", "groups", "free"),
    [
        ("4:memory:/job/step\n1:cpu:/\n", {"memory/job": V1}, 350),
        ("0::/job/step\n", {"job/step": UNLIMITED, "job": V2}, 150),
        ("0::/\n", {"": V2}, 150),
        ("4:memory:/job\n0::/\n", {"memory/job": V1, "": V2}, 150),
        ("0::/job\n", {"job": UNLIMITED}, None),
        ("0::/\n", {}, None),
        (None, {}, None),
    ],
    ids=["v1", "limit-above", "container", "both", "unlimited", "none", "no-cgroups"],
)
def test_free_memory_is_the_machines_or_what_control_groups_leave_of_it(tmp_path, monkeypatch, own, groups, free):
    if own is not None:
        (tmp_path / "own").write_text(own)
    for folder, files in groups.items():
        (tmp_path / "groups" / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / "groups" / folder / name).write_text(text)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    if free is None:
        assert 0 < memory.free_memory_bytes() <= psutil.virtual_memory().total
    else:
        assert memory.free_memory_bytes() == free


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(memory, "_free_in_groups", lambda: [-5])
    assert memory.free_memory_bytes() == 0


def test_engine_takes_its_share_of_what_is_free_and_refuses_a_row_that_needs_more(monkeypatch):
    model = tiny_tree_model()
    monkeypatch.setattr(devices, "free_memory_bytes", lambda: 200 * model.kv_shape.bytes_per_token)
    monkeypatch.setattr(runner, "ENOUGH_KV_BYTES", 50 * model.kv_shape.bytes_per_token)
    engine = Engine(model, EngineConfig(mask="causal", kv_memory_share=0.25))
    assert memory_of(engine).budget_tokens == 50
    prompts = [[Segment(tuple(range(3, 3 + length)), bidirectional=False)] for length in (60, 20)]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=4))
    error = outputs[0].error
    assert error is not None
    assert error.code == RowErrorCode.ROW_OOM
    assert "needs 61 tokens of KV memory or more, the limit is 50 tokens" in error.message
    assert outputs[1].error is None
    told = Engine(model, EngineConfig(kv_cache_memory_bytes=12345))
    assert memory_of(told).budget_bytes == 12345


def test_engine_does_not_start_where_ordinary_rows_would_find_no_memory(monkeypatch):
    model = tiny_tree_model()
    row = model.max_model_len * model.kv_shape.bytes_per_token
    monkeypatch.setattr(devices, "free_memory_bytes", lambda: 4 * row)
    assert Engine(model, EngineConfig(kv_memory_share=0.25)).core.runner.memory.budget_bytes == row
    monkeypatch.setattr(devices, "free_memory_bytes", lambda: 4 * row - 4)
    with pytest.raises(MemoryError, match=rf"{row - 1:,} bytes .* wanted {row:,}; .* workers.kv_cache_memory_bytes"):
        Engine(model, EngineConfig(kv_memory_share=0.25))


def test_workers_of_a_node_share_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("segue.pipeline.processes.ray_session.max_node_cpus", lambda: 16)
    cases: dict[tuple[float, int], int] = {(4, 8): 4, (4, 2): 2, (32, 3): 1, (0.5, 40): 32}  # CPUs of a worker, workers
    job = ready_job(write_job(write_input(tmp_path)))
    whole, half, two = (job.worker_spec(1, num_gpus=number) for number in (1.0, 0.5, 2.0))
    assert half.engine["kv_memory_share"] == whole.engine["kv_memory_share"] / 2 == two.engine["kv_memory_share"] / 2
    assert [(spec.device, spec.device_map) for spec in (job.worker_spec(1), whole, half, two)] == [
        ("cpu", None),
        ("cuda", None),
        ("cuda", None),
        ("cuda", "auto"),
    ]
    assert job.worker_spec(1, 4).engine["kv_memory_share"] == job.worker_spec(1).engine["kv_memory_share"] / 4
    assert {(cpus, size): workers_a_node(WorkersConfig(max_size=size), cpus) for cpus, size in cases} == cases
    assert threads_of(WorkersConfig(threads=32)) == 16


def test_workers_of_a_cluster_without_a_worker_node_get_what_they_ask_for(monkeypatch):
    """A run that goes on where nodes start from zero: nothing is planned, so none was started."""
    monkeypatch.setattr("segue.pipeline.processes.ray_session.max_node_cpus", lambda: 0)
    monkeypatch.setattr("segue.pipeline.processes.ray_session.num_cluster_cpus", lambda: 1)
    workers = WorkersConfig(max_size=8, threads=4)
    assert (threads_of(workers), workers_a_node(workers, 4)) == (4, 8)
    assert threads_of(WorkersConfig(max_size=8)) == 1
