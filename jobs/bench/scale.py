"""Whether the driver's memory stays flat and time linear when a dataset grows ten times, and what a resume reads.

    python -m segue.jobs.bench.scale
    python -m segue.jobs.bench.scale --rows 30000 300000 --rows-per-file 4096

Generated rows go through plan and run with the echo engine, so everything but the model is measured. Then the largest
job runs again and is killed with -9 at half of its shards. The plan's files of finished units are removed, and the job
must still complete: a resume does not read them. Each output is checked row by row.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from segue.jobs.bench.machine import say

NUM_FILES = 8
SYSTEM = "Answer in one word. " * 4
POLL_SECONDS = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description="plan and run datasets of several sizes with the echo engine")
    parser.add_argument("--rows", type=int, nargs="+", default=[30_000, 300_000])
    parser.add_argument("--rows-per-file", type=int, default=4096)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        runs = [_measured(Path(root) / str(rows), rows, args.rows_per_file) for rows in args.rows]
        resumed = _killed_and_resumed(Path(root) / str(args.rows[-1]), args.rows[-1])
    first, last = runs[0], runs[-1]
    grown = last["rows"] / first["rows"]
    result = {
        "runs": runs,
        "memory_ratio": round(last["driver_mib"] / first["driver_mib"], 3),
        "seconds_ratio_over_rows_ratio": round(last["seconds"] / first["seconds"] / grown, 3),
        "resumed": resumed,
    }
    say(
        f"{grown:.0f} times the rows: driver memory {result['memory_ratio']} times, seconds a row "
        f"{result['seconds_ratio_over_rows_ratio']} times"
    )
    print(json.dumps(result))


def _measured(folder: Path, num_rows: int, rows_per_file: int) -> dict[str, Any]:
    _write(folder, num_rows, rows_per_file)
    started = time.monotonic()
    peak = _wait(_start(folder), folder, kill_at=None)
    seconds = time.monotonic() - started
    shards = _check(folder, num_rows)
    return {"rows": num_rows, "shards": shards, "seconds": round(seconds, 1), "driver_mib": round(peak / 2**20)}


def _killed_and_resumed(folder: Path, num_rows: int) -> dict[str, Any]:
    output = folder / "out"
    shutil.rmtree(output)
    _wait(_start(folder), folder, kill_at=0.5)
    done = {path.name for path in output.glob("part-*")}
    units = list((output / "_job" / "units").iterdir())
    for unit in units:
        if unit.name.replace("unit-", "part-", 1) in done:
            unit.unlink()
    _wait(_start(folder), folder, kill_at=None)
    _check(folder, num_rows)
    return {"units": len(units), "done_when_killed": len(done), "read_after": len(units) - len(done)}


def _write(folder: Path, num_rows: int, rows_per_file: int) -> None:
    (folder / "in").mkdir(parents=True)
    size = -(-num_rows // NUM_FILES)
    for number in range(NUM_FILES):
        rows = range(number * size, min(num_rows, (number + 1) * size))
        # A multiple of 7,919 visits every number once, in no useful order.
        prompts = [f"{SYSTEM}Document {row * 7919 % 997}: question {row}?" for row in rows]
        pq.write_table(pa.table({"prompt": prompts, "id": rows}), folder / "in" / f"{number}.parquet")
    job = {
        "name": "scale",
        "model": {"source": "echo"},
        "input": {"path": "in"},
        "sampling_params": {"max_tokens": 16},
        "output": {"path": "out", "max_rows_per_file": rows_per_file},
    }
    (folder / "job.yaml").write_text(json.dumps(job), encoding="utf-8")


def _start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "segue.jobs.cli", "run", str(folder / "job.yaml"), "--json", "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def _wait(process: subprocess.Popen[bytes], folder: Path, kill_at: float | None) -> int:
    """The process' peak of resident memory, in bytes. `kill_at`: kill its session at this share of its shards."""
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            peak = max(peak, 1024 * int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1]))
        if kill_at is not None and _share_done(folder / "out") >= kill_at:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    if process.returncode != (0 if kill_at is None else -signal.SIGKILL):
        raise SystemExit(f"segue run ended with {process.returncode}")
    return peak


def _share_done(output: Path) -> float:
    if not (output / "_job" / "manifest.json").exists():
        return 0.0
    num_units = sum(1 for _ in (output / "_job" / "units").iterdir())
    return sum(1 for _ in output.glob("part-*")) / num_units if num_units else 0.0


def _check(folder: Path, num_rows: int) -> int:
    """Every row once, with its own answer. Returns the number of shards."""
    shards = sorted((folder / "out").glob("part-*"))
    table = pa.concat_tables(pq.read_table(shard, columns=["id", "prompt", "generated_text"]) for shard in shards)
    ids = table["id"].to_pylist()
    wrong = sum(
        not f"{prompt}\nassistant\n".endswith(text)
        for prompt, text in zip(table["prompt"].to_pylist(), table["generated_text"].to_pylist(), strict=True)
    )
    if sorted(ids) != list(range(num_rows)) or wrong:
        raise SystemExit(f"{len(ids)} rows ({len(set(ids))} distinct), {wrong} wrong answers; wanted {num_rows}")
    return len(shards)


if __name__ == "__main__":
    main()
