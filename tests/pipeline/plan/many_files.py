"""What planning many files of one row costs, in seconds of CPU of all processes:

    make script RUN="tests/pipeline/plan/many_files.py 3000"

Prints one line of JSON.
"""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

LOOK_SECONDS = 0.2


def write_files(folder: Path, count: int) -> Path:
    (folder / "in").mkdir()
    for n in range(count):
        table = pa.table({"prompt": [f"prompt number {n}"], "id": [n]})
        pq.write_table(table, folder / "in" / f"{n:06}.parquet")
    sections = {"name": "many", "model": {"source": "echo"}, "input": {"path": "in"}, "output": {"path": "out"}}
    (folder / "job.yaml").write_text(json.dumps(sections))
    return folder / "job.yaml"


def cpu_seconds(command: list[str]) -> float:
    """Of a command and of all that it started, as long as they were seen."""
    used: dict[int, float] = {}
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with suppress(psutil.Error):
            for each in [process, *process.children(recursive=True)]:
                times = each.cpu_times()
                used[each.pid] = times.user + times.system
        time.sleep(LOOK_SECONDS)
    assert process.returncode == 0
    return sum(used.values())


def main() -> None:
    count = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        job = write_files(Path(folder), count)
        started = time.monotonic()
        used = cpu_seconds([sys.executable, "-m", "segue", "plan", str(job), "--json"])
        seconds = time.monotonic() - started
    print(json.dumps({"files": count, "cpu_s": round(used, 1), "wall_s": round(seconds, 1)}))  # noqa: T201


if __name__ == "__main__":
    main()
