"""Jobs over the echo engine, for tests of everything around a model: data with awkward types, and what comes out."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

NUM_ROWS = 60
ROWS_PER_FILE = 16
LOCATIONS = {"input": {"path": "s3://data/in"}, "output": {"path": "s3://data/out", "max_rows_per_file": 16}}
PATIENCE = 600.0  # seconds until something that must happen has failed, on a machine much slower than ours


def awkward_table(start: int, stop: int) -> pa.Table:
    """Rows whose prompts share beginnings, in no useful order, with columns that are easily damaged on the way."""
    numbers = list(range(start, stop))
    return pa.table(
        {
            "prompt": [f"{'abc'[n % 3] * 40} number {n}" for n in numbers],
            "id": pa.array(numbers, pa.uint16()),
            "kind": pa.array(
                ["xyz"[n % 3] if n % 7 else None for n in numbers], pa.dictionary(pa.int32(), pa.string())
            ),
            "time": pa.array([n * 10**17 + 1 if n % 5 else None for n in numbers], pa.timestamp("ns")),
            "price": pa.array([Decimal(n).scaleb(-2) if n % 4 else None for n in numbers], pa.decimal128(9, 2)),
            "tags": pa.array([[n, None] if n % 3 else ([] if n % 2 else None) for n in numbers], pa.list_(pa.int16())),
            "part": pa.array([{"a": n, "b": None} if n % 6 else None for n in numbers]).cast(
                pa.struct([("a", pa.int8()), ("b", pa.list_(pa.string()))])
            ),
            "view": pa.array([f"seen {n}" * n if n % 4 else None for n in numbers], pa.string_view()),
            "vector": pa.array([[n, -n] for n in numbers], pa.list_(pa.field("item", pa.float32(), nullable=False), 2)),
            "odd": pa.array([float("nan") if n % 2 else -0.0 for n in numbers]),
            "nothing": pa.nulls(len(numbers)),
        }
    )


def write_input(folder: Path, num_rows: int = NUM_ROWS) -> Path:
    """Two files of several row groups in `folder`/in."""
    (folder / "in").mkdir(parents=True)
    half = num_rows // 2
    pq.write_table(awkward_table(0, half), folder / "in" / "a.parquet", row_group_size=7)
    pq.write_table(awkward_table(half, num_rows), folder / "in" / "b.parquet", row_group_size=50)
    return folder


def write_job(folder: Path, name: str = "job.yaml", **sections: Any) -> Path:
    """A job file beside the data; JSON is YAML."""
    job = {
        "name": "job",
        "model": {"source": "echo"},
        "input": {"path": "in"},
        "sampling_params": {"max_tokens": 6},
        "output": {"path": "out", "max_rows_per_file": ROWS_PER_FILE},
    }
    path = folder / name
    path.write_text(json.dumps(job | sections))
    return path


def shards_in(output: Path) -> list[Path]:
    return sorted(output.glob("part-*.parquet"))


def rows_of(output: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The output as plain pyarrow reads it, by provenance. Fails if a row is there twice."""
    rows = [row for path in shards_in(output) for row in pq.read_table(path).to_pylist()]
    keyed = {(row["src_path"], row["src_row"]): row for row in rows}
    assert len(keyed) == len(rows), "a row appears twice"
    return keyed


def origins(num_rows: int = NUM_ROWS) -> set[tuple[str, int]]:
    half = num_rows // 2
    return {("a.parquet", n) for n in range(half)} | {("b.parquet", n) for n in range(num_rows - half)}


def answers(output: Path) -> dict[tuple[str, int], Any]:
    return {key: row["generated_text"] for key, row in rows_of(output).items()}


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    """Until the condition holds; fails if it takes too long or the process ends before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        ended = process is not None and process.poll() is not None
        assert not ended, f"the process ended with {process.returncode}: {process.communicate()}"  # type: ignore[union-attr]
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


@contextmanager
def segue_process(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The installed command in a session of its own, standing in `folder`; nothing of it survives the block."""
    command = [str(Path(sys.executable).with_name("segue")), *arguments]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        for pid in _members(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def _members(session: int) -> set[int]:
    """Processes of a session."""
    found = set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                found.add(int(entry.name))
    return found


def worker_pids(session: int) -> list[int]:
    """Processes of a run's pool."""
    found = []
    for pid in _members(session):
        with suppress(OSError):
            if b"MapWorker(MapBatches(UnitWorker))" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    assert found, "there is no worker"
    return found


def outcome(process: subprocess.Popen[str], patience: float = PATIENCE) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) once it ends by itself."""
    out, err = process.communicate(timeout=patience)
    return process.returncode, out, err
