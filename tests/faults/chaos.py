"""Seeded kills of everything that takes part in a run, on local disk and on S3, with the echo engine and a tiny model.

    make script RUN=tests/faults/chaos.py                       5 faults, 2 places, 2 engines, 3 seeds: 60 runs, 40 min
    make script RUN="tests/faults/chaos.py --runs 8 --seed 7"   some of them

A run is disturbed at a moment drawn at random, and run again until it is done; every third is planned in two windows.
What is there is then compared with the input, its answers with those of the echo engine, or of an undisturbed run of
the model in fp32: they may differ only from a token on at which the two best are closer than 1e-3.
Prints a table, and exits with 1 if anything is wrong.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
from crash_points import bucket
from echo_jobs import outcome, segue_process, wait_for, worker_pids, write_input, write_job
from fault_proxy import Fault, FaultProxy, fault_proxy
from fsspec.implementations.local import LocalFileSystem
from oracle import Inexact, check_exact, echo_answer, input_rows
from rich.console import Console
from rich.table import Table
from two_nodes import two_nodes

NUM_ROWS, ROWS_PER_FILE, MAX_TOKENS = 48, 4, 6
NUM_SHARDS = NUM_ROWS // ROWS_PER_FILE
TIE = 1e-3  # between the log-probabilities of the two best tokens
WORKERS = {"min_size": 2, "max_size": 2, "units_in_flight": 1, "step_timeout_s": 4, "threads": 1}
MAX_RUNS = 6  # of a job that is disturbed once
PATIENCE = 600.0  # seconds for a run that others run beside
Answers = dict[tuple[str, int], dict[str, Any]]  # whole rows of an output, by where they come from


@dataclass
class Setting:
    """A job in its place."""

    folder: Path
    fs: Any
    inputs: str
    output: str
    job: Path
    random: random.Random
    reference: Answers | None  # of the model, undisturbed
    proxy: FaultProxy | None

    def num_shards(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return sum("/part-" in path for path in self.fs.find(self.output, maxdepth=1))
        return 0

    @contextmanager
    def run(self) -> Iterator[subprocess.Popen[str]]:
        with segue_process(self.folder, "run", str(self.job), "--json", "--quiet") as process:
            yield process

    def wait_for_some(self, process: subprocess.Popen[str]) -> None:
        """Until a number of shards that is drawn at random is there."""
        wanted = self.random.randint(0, NUM_SHARDS * 2 // 3)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: self.num_shards() >= wanted, process)
        time.sleep(self.random.random())


def kill_driver(setting: Setting) -> None:
    with setting.run() as process:
        setting.wait_for_some(process)
    # The session is killed at the end of the block.


def kill_worker(setting: Setting) -> None:
    _signal_worker(setting, signal.SIGKILL)


def freeze_worker(setting: Setting) -> None:
    _signal_worker(setting, signal.SIGSTOP)


def _signal_worker(setting: Setting, signum: int) -> None:
    with setting.run() as process:
        setting.wait_for_some(process)
        with contextlib.suppress(AssertionError, ProcessLookupError):  # between two pools there is no worker
            os.kill(setting.random.choice(worker_pids(process.pid)), signum)
        outcome(process, PATIENCE)


def kill_node(setting: Setting) -> None:
    """A cluster of two nodes, of which the one without the driver vanishes."""
    with two_nodes() as (address, kill), patch.dict(os.environ, {"RAY_ADDRESS": address}), setting.run() as process:
        setting.wait_for_some(process)
        kill()
        outcome(process, PATIENCE)


def two_drivers(setting: Setting) -> None:
    with setting.run() as first:
        time.sleep(setting.random.uniform(0, 8))
        with setting.run() as second:
            outcome(first, PATIENCE)
            outcome(second, PATIENCE)


FAULTS: dict[str, Callable[[Setting], None]] = {
    "driver killed": kill_driver,
    "worker killed": kill_worker,
    "worker frozen": freeze_worker,
    "node killed": kill_node,
    "two drivers": two_drivers,
}
PLACES, ENGINES = ("local", "s3"), ("echo", "model")


@contextmanager
def settings(place: str, engine: str, seed: int, reference: Answers | None = None) -> Iterator[Setting]:
    """A fresh place with its input, where nothing has gone wrong yet."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = write_input(Path(name), NUM_ROWS)
        fs: Any = LocalFileSystem()
        proxy, inputs, output = None, str(folder / "in"), str(folder / "out")
        if place == "s3":
            from s3fs import S3FileSystem

            host, port = stack.enter_context(bucket())
            proxy = stack.enter_context(fault_proxy(host, port))
            stack.enter_context(patch.dict(os.environ, {"AWS_ENDPOINT_URL": proxy.url}))
            fs = S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
            fs.rm("data", recursive=True)  # moto keeps its state from server to server
            fs.mkdir("data")
            fs.put(inputs, "data/in", recursive=True)
            inputs, output = "data/in", "data/out"
        prefix = "s3://" if place == "s3" else ""
        model = {"source": "echo:0.7"} if engine == "echo" else {"source": _model(folder), "dtype": "float32"}
        job = write_job(
            folder,
            model=model,
            input={"path": prefix + inputs},
            output={"path": prefix + output, "max_rows_per_file": ROWS_PER_FILE},
            plan={"window_rows": NUM_ROWS // 2 if seed % 3 == 1 else NUM_ROWS},
            sampling_params={"max_tokens": MAX_TOKENS, "temperature": 0}
            | ({} if engine == "echo" else {"logprobs": 2}),
            workers=WORKERS,
        )
        setting = Setting(folder, fs, inputs, output, job, random.Random(seed), reference, proxy)
        if proxy is not None:
            setting.random.shuffle(NOISE)
            proxy.faults += [Fault(**fault) for fault in NOISE[: setting.random.randint(0, 4)]]
        yield setting


NOISE: list[dict[str, Any]] = [  # what networks and stores do all the time
    {"kind": "lost_reply", "path": "part-"},
    {"kind": "lost_reply", "path": "manifest"},
    {"kind": "lost_reply", "path": "_SUCCESS"},
    {"kind": "status", "path": "part-", "times": 2},
    {"kind": "reset", "method": "GET", "path": "units/"},
    {"kind": "flip", "method": "GET", "path": "units/"},
    {"kind": "cut", "method": "GET", "path": "in/"},
]


def _model(folder: Path) -> str:
    from tiny_models import tiny_model, tiny_tokenizer

    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return str(folder / "model")


def finish(setting: Setting) -> int:
    """Run until it is done; how many runs it took."""
    for number in range(1, MAX_RUNS + 1):
        with setting.run() as process:
            code, out, err = outcome(process, PATIENCE)
        if code == 0:
            return number
    raise Inexact(f"not done after {MAX_RUNS} runs: {code} {out} {err}")


def answers(setting: Setting) -> Answers:
    found = {}
    for path in setting.fs.find(setting.output, maxdepth=1):
        if "/part-" in path:
            with setting.fs.open(path, "rb") as file:
                found |= {(row["src_path"], row["src_row"]): row for row in pq.read_table(file).to_pylist()}
    return found


def count_ties(setting: Setting) -> int:
    """Rows that are answered otherwise than in the undisturbed run, each from a tie on. Raises Inexact."""
    if setting.reference is None:
        return 0
    ties = 0
    for key, row in answers(setting).items():
        wanted = setting.reference[key]
        pairs = zip(row["logprobs"], wanted["logprobs"], strict=False)
        differing = next((other for own, other in pairs if own["token_id"] != other["token_id"]), None)
        if differing is not None:
            best, second = sorted((top["logprob"] for top in differing["top"]), reverse=True)[:2]
            if best - second > TIE:
                raise Inexact(f"{key} is answered otherwise, and there is no tie: {best} and {second}")
            ties += 1
        elif row["generated_text"] != wanted["generated_text"]:
            raise Inexact(f"{key} is answered otherwise")
    return ties


@dataclass
class Row:
    """Of the table."""

    runs: int = 0
    lost: int = 0
    duplicated: int = 0
    ties: int = 0
    wrong: int = 0

    def add(self, other: "Row") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def undisturbed() -> Answers:
    """What the model answers when nothing goes wrong."""
    with settings("local", "model", seed=0) as setting:
        finish(setting)
        return answers(setting)


def disturb(fault: str, place: str, engine: str, seed: int, reference: Answers) -> Row:
    """One run, disturbed and finished."""
    row = Row(runs=1)
    started = time.monotonic()
    with settings(place, engine, seed, reference if engine == "model" else None) as setting:
        try:
            FAULTS[fault](setting)
            finish(setting)
            answer = (lambda given: echo_answer(given["prompt"], MAX_TOKENS)) if engine == "echo" else None
            check_exact(setting.fs, setting.inputs, setting.output, answer=answer)
            row.ties += count_ties(setting)
        except (Inexact, subprocess.TimeoutExpired) as error:
            row.wrong += 1
            print(f"{fault}, {place}, {engine}, seed {seed}: {error}", file=sys.stderr)
        origins = _origins(setting)
        row.lost += len(set(input_rows(setting.fs, setting.inputs)) - set(origins))
        row.duplicated += len(origins) - len(set(origins))
    print(f"{fault}, {place}, {engine}, seed {seed}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return row


def _origins(setting: Setting) -> list[tuple[str, int]]:
    found = []
    for path in setting.fs.find(setting.output, maxdepth=1):
        if "/part-" in path:
            with setting.fs.open(path, "rb") as file:
                table = pq.read_table(file, columns=["src_path", "src_row"])
            found += zip(table["src_path"].to_pylist(), table["src_row"].to_pylist(), strict=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="seeded kills")
    parser.add_argument("--runs", type=int, help="only so many, drawn at random")
    parser.add_argument("--seeds", type=int, default=3, help="of each fault, place and engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=4, help="runs at once: they wait more than they compute")
    args = parser.parse_args()
    cases = [
        (fault, place, engine, args.seed + number)
        for fault in FAULTS
        for place in PLACES
        for engine in ENGINES
        for number in range(args.seeds)
    ]
    if args.runs is not None:
        cases = random.Random(args.seed).sample(cases, args.runs)
    columns = zip(*cases, strict=True)
    rows = {fault: Row() for fault, *_ in cases}
    reference = undisturbed()
    with ProcessPoolExecutor(args.parallel, mp_context=multiprocessing.get_context("spawn")) as pool:
        for (fault, *_), row in zip(cases, pool.map(partial(disturb, reference=reference), *columns), strict=True):
            rows[fault].add(row)
    table = Table("fault", "runs", "lost", "duplicated", "content equal", "of these from a tie on")
    for fault, row in rows.items():
        equal = f"{row.runs - row.wrong} of {row.runs}"
        table.add_row(fault, *map(str, (row.runs, row.lost, row.duplicated, equal, row.ties)))
    Console().print(table)
    print(json.dumps({fault: vars(row) for fault, row in rows.items()}))
    return int(any(row.wrong or row.lost or row.duplicated for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
