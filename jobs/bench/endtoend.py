"""A whole `segue run` on SmolLM2-135M: against its engine in process, and at several sizes of the dataset.

    python -m segue.jobs.bench.endtoend                            4,000 rows by both, in turn; start to first shard
    python -m segue.jobs.bench.endtoend --rows 1000 10000 100000   time a row and memory as datasets grow

Beside the engine, rows are those of `segue.jobs.bench.generate --case shared`: 300 words that all share, 30 to 110 of
their own, 16 new tokens. Growing datasets have 60, 4 to 12, and 4. Each output is checked: every row is there once.
Beside the engine, answers must be equal to the engine's, but for those that bf16 changes in another batch.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from segue.jobs.bench.machine import SOURCE, machine, say, seconds_of
from segue.jobs.bench.prompts import COMMON
from segue.workers.engine.engine import Engine
from segue.workers.rows.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a dataset's rows."""

    shared_words: int
    own_words: tuple[int, int]
    max_tokens: int


ORDINARY, SMALL = Shape(300, (30, 110), 16), Shape(60, (4, 12), 4)
LEAST_EQUAL = {"float32": 0.99, "bfloat16": 0.5}  # share of the answers; prompts of random words have many near ties
POLL_SECONDS = 0.1
MEMORY_SECONDS = 2.0  # between two readings, since reading all processes takes time from the run


def main() -> None:
    args = _arguments()
    report: dict[str, Any] = {"benchmark": "endtoend", **machine(), "dtype": args.dtype}
    with tempfile.TemporaryDirectory() as root:
        if len(args.rows) == 1:
            report |= _beside_the_engine(Path(root), args.rows[0], args)
        else:
            report |= _growing(Path(root), args.rows, args)
    print(json.dumps(report))


def _beside_the_engine(folder: Path, num_rows: int, args: argparse.Namespace) -> dict[str, Any]:
    rows_per_file = args.rows_per_file
    prompts = _write(folder, num_rows, ORDINARY, args)
    run = _run(folder)
    engine = Engine.from_pretrained(SOURCE, mask="causal", dtype=args.dtype)
    params = SamplingParams(max_tokens=ORDINARY.max_tokens, ignore_eos=True)
    engine.generate(prompts[:8], params)
    outputs: list[Any] = []
    seconds = seconds_of(lambda: outputs.extend(engine.generate(prompts, params)))
    texts = _answers(folder, num_rows)
    equal = sum(output.outputs[0].text == texts[index] for index, output in enumerate(outputs)) / num_rows
    if equal < LEAST_EQUAL[args.dtype]:
        raise SystemExit(f"{equal:.1%} of the answers are those of the engine in process")
    found = {
        "rows": num_rows,
        **run,
        "engine_seconds": seconds,
        "share_of_engine": seconds / run["seconds"],
        "share_of_engine_after_first_shard": seconds * (1 - rows_per_file / num_rows) / run["seconds_after_first"],
        "equal_answers": equal,
    }
    say(
        f"{num_rows:,} rows: segue run {num_rows / run['seconds']:.1f} rows/s from start to end, the engine in process "
        f"{num_rows / seconds:.1f}: {found['share_of_engine']:.2f}; first shard after {run['first_seconds']:.1f} s, "
        f"{found['share_of_engine_after_first_shard']:.2f} from then on; {equal:.1%} of the answers equal"
    )
    return found


def _growing(folder: Path, sizes: Sequence[int], args: argparse.Namespace) -> dict[str, Any]:
    runs = []
    for num_rows in sizes:
        _write(folder / str(num_rows), num_rows, SMALL, args)
        run = _run(folder / str(num_rows))
        _answers(folder / str(num_rows), num_rows)
        runs.append({"rows": num_rows, **run, "ms_a_row": 1e3 * run["seconds_after_first"] / max(1, run["rows_after"])})
        say(
            f"{num_rows:,} rows: {run['seconds']:.1f} s, first shard after {run['first_seconds']:.1f}; then "
            f"{runs[-1]['ms_a_row']:.3f} ms a row; driver {run['driver_mib']} MiB, all processes {run['all_mib']}"
        )
    first, last = runs[0], runs[-1]
    return {
        "runs": runs,
        "time_ratio": last["ms_a_row"] / first["ms_a_row"],
        "memory_ratio": last["all_mib"] / first["all_mib"],
    }


def _write(folder: Path, num_rows: int, shape: Shape, args: argparse.Namespace) -> list[str]:
    """Write the dataset and its job file. Returns the prompts."""
    (folder / "in").mkdir(parents=True)
    rng, words = random.Random(0), COMMON.split()
    shared = " ".join(rng.choice(words) for _ in range(shape.shared_words))
    own = [
        f"{row} " + " ".join(rng.choice(words) for _ in range(rng.randint(*shape.own_words))) for row in range(num_rows)
    ]
    pq.write_table(pa.table({"id": range(num_rows), "own": own}), folder / "in" / "rows.parquet")
    job = {
        "name": "endtoend",
        "model": {"source": SOURCE, "dtype": args.dtype},
        "mask": "causal",
        "input": {"path": "in"},
        "prompt": {"format": "text", "text": shared + " {own}"},
        "sampling_params": {"max_tokens": shape.max_tokens, "ignore_eos": True},
        "output": {"path": "out", "max_rows_per_file": args.rows_per_file},
    }
    (folder / "job.yaml").write_text(json.dumps(job), encoding="utf-8")
    return [f"{shared} {text}" for text in own]


def _run(folder: Path) -> dict[str, Any]:
    """Seconds to the first shard and to the end, and the peaks of resident memory."""
    command = [sys.executable, "-m", "segue.jobs.cli", "run", str(folder / "job.yaml"), "--json", "--quiet"]
    started, first, driver, everything = time.monotonic(), 0.0, 0, 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    rows_first, looked = 0, started
    while process.poll() is None:
        shards = list((folder / "out").glob("part-*"))
        if shards and not first:
            first = time.monotonic() - started
            rows_first = sum(pq.read_metadata(shard).num_rows for shard in shards)
        if time.monotonic() - looked > MEMORY_SECONDS:
            of_driver, of_all = _own_and_all(process.pid)
            driver, everything, looked = max(driver, of_driver), max(everything, of_all), time.monotonic()
        time.sleep(POLL_SECONDS)
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"segue run ended with {process.returncode}")
    shards = list((folder / "out").glob("part-*"))
    return {
        "seconds": seconds,
        "first_seconds": first or seconds,
        "seconds_after_first": seconds - (first or 0.0),
        "rows_after": sum(pq.read_metadata(shard).num_rows for shard in shards) - rows_first,
        "driver_mib": driver >> 20,
        "all_mib": everything >> 20,
    }


def _own_and_all(pid: int) -> tuple[int, int]:
    """(resident bytes of a process, the same with all processes that it has started)"""
    with contextlib.suppress(psutil.NoSuchProcess):
        whole = psutil.Process(pid)
        return whole.memory_info().rss, sum(_own_bytes(each) for each in (whole, *whole.children(recursive=True)))
    return 0, 0


def _own_bytes(process: psutil.Process) -> int:
    """Without memory that several processes share."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        memory = process.memory_info()
        return memory.rss - memory.shared
    return 0


def _answers(folder: Path, num_rows: int) -> list[str]:
    """The answers of all rows, in order. Ends the program if a row is missing, there twice, or has an error."""
    shards = sorted((folder / "out").glob("part-*"))
    table = pa.concat_tables(pq.read_table(shard, columns=["id", "generated_text"]) for shard in shards)
    texts = dict(zip(table["id"].to_pylist(), table["generated_text"].to_pylist(), strict=True))
    if table.num_rows != num_rows or len(texts) != num_rows or None in texts.values():
        raise SystemExit(f"{table.num_rows} rows, {len(texts)} distinct; wanted {num_rows}, each with an answer")
    return [texts[row] for row in range(num_rows)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="whole runs against the engine, and as datasets grow")
    parser.add_argument("--rows", type=int, nargs="+", default=[4000])
    parser.add_argument("--rows-per-file", type=int, default=250)
    parser.add_argument("--dtype", choices=list(LEAST_EQUAL), default="bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
