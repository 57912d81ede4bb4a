"""A small training job, a job that answers with its adapter, and what a training leaves."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml_job

from segue.pipeline.ledger.manifest import load_manifest
from segue.pipeline.ledger.training_metrics import read_metrics
from segue.pipeline.ready.job import ReadyJob
from segue.pipeline.run.run import plan_job
from segue.pipeline.run.worker import UnitWorker
from segue.pipeline.storage.folder import LocalStore
from segue.pipeline.train.examples import TrainingData, load_training_data
from segue.pipeline.train.finetune import FinetuneSummary, ReadyFinetune, prepare_finetune, run_finetune

ROWS = [{"ask": f"word {number}?", "answer": "abcde"[number % 5] * (1 + number % 4)} for number in range(30)]
SYSTEM = "Say the letter."


def write(folder: Path, source: str, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> Path:
    """The training's job file, beside its rows."""
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=7)
    job = {
        "name": "letters",
        "model": {"source": source, "dtype": "float32"},
        "mask": "segment",
        "input": {"path": "rows.parquet"},
        "prompt": {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "{ask}"}]},
        "scoring": {"continuation_column": "answer"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "training": {
            "num_epochs": 30,
            "batch_size": 6,
            "learning_rate": 0.003,
            "warmup_steps": 10,
            "eval_steps": 20,
            "save_steps": 15,
        },
        "evaluation": {"fraction": 0.2},
        "output": {"path": "ft", "max_rows_per_file": 8},
        "workers": {"threads": 1},
        **changes,
    }
    return yaml_job.write(folder, job, "ft.yaml")


def write_run(folder: Path, source: str, **changes: Any) -> Path:
    """The job file of a run that answers with the adapter."""
    job = {
        "name": "answers",
        "model": {"source": source, "dtype": "float32", "adapter": "ft/adapter"},
        "input": {"path": "rows.parquet"},
        "prompt": {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "{ask}"}]},
        "sampling_params": {"max_tokens": 4},
        "output": {"path": "out"},
        **changes,
    }
    return yaml_job.write(folder, job, "run.yaml")


def finetune(path: Path, *overrides: str) -> FinetuneSummary:
    return run_finetune(prepare_finetune(path, overrides), lambda line: None, lambda line: None)


def computed_here(job: ReadyJob) -> list[str]:
    """Plan a job and compute its units in this process; the status of each."""
    manifest = plan_job(job, lambda line: None)
    worker = UnitWorker(job.worker_spec(threads=1))
    try:
        return [asyncio.run(worker.run_unit(unit)).status for unit in manifest.units]
    finally:
        assert worker._loop is not None
        worker._loop.stop()


def curve(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a training without their times."""
    lines = read_metrics(LocalStore(folder))
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "seconds_left")} for line in lines]


def training_data(ready: ReadyFinetune) -> TrainingData:
    manifest = load_manifest(ready.job.store)
    assert manifest is not None
    return load_training_data(ready.job.store, manifest, ready.spec.holdout, ready.spec.answer_end_id)


def planned_again(folder: Path, target: Path) -> Path:
    """The files and plan of a training in `folder`, in another folder, as if it had just been planned there."""
    for name in ("rows.parquet", "ft.yaml"):
        shutil.copy2(folder / name, target / name)  # the same times: they are part of a file's identity
    shutil.copytree(folder / "ft" / "_job", target / "ft" / "_job")
    return target / "ft.yaml"
