"""Pools on a Ray that says it has GPUs: who gets which, and what happens where there is none. No GPU is needed."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from echo_jobs import PATIENCE, outcome, rows_of, segue_process, write_input, write_job

from segue.pipeline.jobfile.schema import WorkersConfig
from segue.pipeline.ledger.units import UnitSpec
from segue.pipeline.problems import WorkersFailed
from segue.pipeline.processes import ray_session, reservation
from segue.pipeline.processes.reservation import Reservation, check_gpus, gpus_of
from segue.pipeline.run import pool

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": float(sys.argv[1])})
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextmanager
def ray_with_gpus(num_gpus: int) -> Iterator[str]:
    """The address of a Ray whose one node has so many GPUs in its books."""
    command = [sys.executable, "-c", CLUSTER, str(num_gpus)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, "Ray did not start"
        yield address
    finally:
        process.communicate(timeout=PATIENCE)


@pytest.fixture(scope="module")
def four_gpus():
    with ray_with_gpus(4) as address:
        yield address


@pytest.fixture
def joined(four_gpus, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", four_gpus)
    with ray_session.ray_session():
        yield


def _gate() -> Any:
    """An actor that workers tell of themselves. Defined here, as Ray's processes cannot import this file."""

    @ray.remote(num_cpus=0)
    class Gate:
        def __init__(self) -> None:
            self.devices: dict[str, str] = {}

        def arrive(self, actor_id: str, devices: str) -> None:
            self.devices[actor_id] = devices

        def devices_of_all(self) -> dict[str, str]:
            return self.devices

    return Gate.remote()


def _probe(gate: Any, num_workers: int) -> type:
    class Probe:
        """In place of a worker: says which devices Ray gave it, and holds them until so many workers have some."""

        def __init__(self, spec, roster):
            import os

            import ray

            actor_id = ray.get_runtime_context().get_actor_id()
            ray.get(gate.arrive.remote(actor_id, os.environ.get("CUDA_VISIBLE_DEVICES", "")))

        async def __call__(self, batch):
            import asyncio

            while len(await gate.devices_of_all.remote()) < num_workers:
                await asyncio.sleep(0.02)
            ordinals = [json.loads(str(text))["ordinal"] for text in batch["unit"]]
            return {"receipt": [json.dumps({"ordinal": ordinal, "status": "committed"}) for ordinal in ordinals]}

    return Probe


def _devices_of(workers: int, wanted: Reservation, monkeypatch, *, num_served: int | None = None) -> Counter[str]:
    """How many workers of the pool had each value of CUDA_VISIBLE_DEVICES; `num_served` of them get what they want."""
    gate = _gate()
    monkeypatch.setattr(pool, "UnitWorker", _probe(gate, num_served or workers))
    units = [UnitSpec(n, f"{n:016}", 1, 1, 1) for n in range(3 * workers)]
    config = WorkersConfig(min_size=workers, max_size=workers)
    receipts = list(pool.run_units(units, config, None, None, wanted, units_in_flight=1))  # type: ignore[arg-type]
    assert len(receipts) == len(units)
    devices: dict[int, str] = ray.get(gate.devices_of_all.remote())  # type: ignore[assignment]
    return Counter(devices.values())


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_of_a_pool_get_a_gpu_each(num_workers, joined, monkeypatch):
    found = _devices_of(num_workers, Reservation(1, 1.0), monkeypatch)
    assert list(found.values()) == [1] * num_workers
    assert set(found) <= {"0", "1", "2", "3"}


@pytest.mark.slow
def test_workers_of_half_a_gpu_share_one_in_pairs(joined, monkeypatch):
    assert sorted(_devices_of(4, Reservation(1, 0.5), monkeypatch).values()) == [2, 2]


@pytest.mark.slow
def test_worker_of_two_gpus_gets_two(joined, monkeypatch):
    found = _devices_of(2, Reservation(1, 2.0), monkeypatch)
    assert sorted(len(devices.split(",")) for devices in found) == [2, 2]
    assert len({device for devices in found for device in devices.split(",")}) == 4


@pytest.mark.slow
def test_pool_with_fewer_gpus_than_workers_goes_on_with_those_it_gets(joined, monkeypatch):
    assert len(_devices_of(2, Reservation(1, 4.0), monkeypatch, num_served=1)) == 1


@pytest.mark.slow
def test_auto_is_a_gpu_where_the_cluster_has_any(joined):
    assert gpus_of(WorkersConfig()) == 1.0
    assert gpus_of(WorkersConfig(num_gpus=0)) == 0.0
    assert gpus_of(WorkersConfig(num_gpus=0.25)) == 0.25


def test_auto_is_the_cpu_where_the_cluster_has_none(monkeypatch):
    monkeypatch.setattr(reservation.ray_session, "num_cluster_gpus", lambda: 0.0)
    assert gpus_of(WorkersConfig()) == 0.0


def test_more_gpus_than_any_node_has_are_waited_for_on_a_cluster_alone():
    assert check_gpus(1.0, 4.0, is_local=True) is None
    message = "workers.num_gpus is 2, and no node has more than 0 at the moment"
    assert check_gpus(2.0, 0.0, is_local=False) == f"{message}: waiting for the cluster to grow"
    with pytest.raises(WorkersFailed, match=message):
        check_gpus(2.0, 0.0, is_local=True)


def test_accelerator_type_is_asked_for_by_its_name():
    assert Reservation(2, 0.5, "L4").options() == {"num_cpus": 2, "num_gpus": 0.5, "accelerator_type": "L4"}
    assert Reservation(2).options() == {"num_cpus": 2}


def _run(folder: Path, address: str, monkeypatch, dtype: str, **workers: object) -> tuple[int, str, str]:
    monkeypatch.setenv("RAY_ADDRESS", address)
    job = write_job(folder, model={"source": str(folder / "model"), "dtype": dtype}, workers=workers)
    with segue_process(folder, "run", str(job), "--json", "--quiet") as process:
        return outcome(process)


@pytest.fixture
def with_model(tmp_path):
    from tiny_models import tiny_model, tiny_tokenizer

    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return write_input(tmp_path, 12)


@pytest.mark.long
def test_worker_that_was_given_a_gpu_never_computes_on_the_cpu_instead(with_model, four_gpus, monkeypatch):
    """Ray's books say that there is one; torch sees none."""
    code, _, err = _run(with_model, four_gpus, monkeypatch, "bfloat16", num_gpus=1)
    assert code == 4
    assert "a GPU was asked for, and torch sees none in this process" in err


@pytest.mark.slow
def test_precision_that_gpus_do_not_compute_is_refused_before_anything_starts(with_model, four_gpus, monkeypatch):
    code, _, err = _run(with_model, four_gpus, monkeypatch, "float32", num_gpus=1)
    assert code == 2
    assert "dtype float32 is not computed by the attention kernels of GPUs; use bfloat16 or float16" in err


@pytest.mark.long
def test_worker_that_was_asked_to_computes_on_the_cpu_of_a_cluster_with_gpus(with_model, four_gpus, monkeypatch):
    code, out, err = _run(with_model, four_gpus, monkeypatch, "float32", num_gpus=0)
    assert code == 0, err
    assert json.loads(out)["num_errors"] == 0
    assert len(rows_of(with_model / "out")) == 12
