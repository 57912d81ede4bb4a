"""A fine-tuning job from its file to an adapter: checked and planned like any job, then trained in this process, or in
several through Ray Train if `workers.max_size` says so.

Whatever ends it, running it again goes on from the latest checkpoint.
"""

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import cluster
from pipeline.config_file import JobDraft, read_job
from pipeline.finetune_config import FinetuneConfig
from pipeline.interrupt import Interrupt
from pipeline.job import ReadyJob, checked_encoder, prepared, today
from pipeline.manifest import SUCCESS
from pipeline.problems import JobRefused, Problem
from pipeline.run import Say, plan_job
from pipeline.sources import discover
from pipeline.training_data import Holdout
from pipeline.training_process import ADAPTER, METRICS, NothingToTrain, TrainingSpec, read_metrics, train_process
from workers.echo import is_echo
from workers.model_source import ModelRefused
from workers.ranks import Ranks

WATCH_SECONDS = 1.0


@dataclass(frozen=True)
class ReadyFinetune:
    """A training that may be planned and run."""

    job: ReadyJob
    config: FinetuneConfig
    spec: TrainingSpec


@dataclass(slots=True)
class FinetuneSummary:
    """What `segue finetune` has made."""

    status: str  # done | already_complete | interrupted
    output: str
    adapter: str | None = None  # the folder for `model.adapter`
    exit_code: int = 0
    steps: int = 0
    num_steps: int = 0  # of the whole training, unless it stops early
    stopped_early: bool = False
    examples: int = 0
    held_out: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # rows that could not be used, by code
    eval_loss: float | None = None  # of the adapter that is kept, nats an answer token
    best_step: int | None = None
    tokens: int = 0  # fed in all steps
    training_seconds: float = 0.0
    tokens_per_second: float = 0.0


def prepare_finetune(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ReadyFinetune:
    """Read and check a job file. Raises JobRefused with every problem."""
    draft = read_job(path, overrides, FinetuneConfig)
    config = draft.config
    if not isinstance(config, FinetuneConfig):
        prepared(draft)
        raise JobRefused(draft.problems)
    job = prepared(_with_held_out_files(draft, config), _problems(config))
    encoder = checked_encoder(job.render_spec(today()))
    try:
        answer_end_id = encoder.answer_end_id()
    except ValueError as error:
        raise JobRefused([Problem("prompt", "", str(error))]) from error
    spec = TrainingSpec(
        output=config.output.path,
        source=config.model.source,
        revision=job.facts.commit or config.model.revision,
        dtype=job.facts.dtype,
        lora=config.lora,
        training=config.training,
        holdout=_holdout(config, job),
        seed=config.seed,
        answer_end_id=answer_end_id,
        record=encoder.record(job.mask, config.model.source),
        threads=config.workers.threads,
    )
    learned = {
        "answer_end_id": answer_end_id,
        "lora": config.lora.model_dump(mode="json"),
        "training": config.training.model_dump(mode="json"),
        "evaluation": config.evaluation.model_dump(mode="json", exclude={"path"}),
        "evaluation.path": sorted(spec.holdout.src_paths or ()),
    }
    return ReadyFinetune(replace(job, fields=job.fields | learned), config, spec)


def run_finetune(ready: ReadyFinetune, say: Say, show: Callable[[dict[str, Any]], None]) -> FinetuneSummary:
    """Plan if needed, and train what is missing. `show` is told each line of the metrics.

    Raises ForeignOutput, InputChanged, InputUnreadable, WorkersFailed, ClusterUnavailable, OutputStorageError,
    JobRefused for data that is not enough, TrainingDiverged.
    """
    store = ready.job.store
    plan_job(ready.job, say)
    if store.exists(SUCCESS):
        return _summary(ready, "already_complete")
    num_processes = ready.config.workers.max_size
    try:
        with Interrupt() as interrupt, _watched(store.path(METRICS), show):
            if num_processes == 1:
                interrupt.on_set = lambda: say("interrupted: the step at work is finished and saved")
                if not train_process(ready.spec, Ranks(), lambda: interrupt.is_set):
                    return _summary(ready, "interrupted", interrupt.exit_code)
            else:
                _train_group(ready, num_processes, interrupt)
    except (NothingToTrain, ModelRefused) as error:
        raise JobRefused([Problem("", "", str(error))]) from None
    return _summary(ready, "done")


def _train_group(ready: ReadyFinetune, num_processes: int, interrupt: Interrupt) -> None:
    from pipeline.training_group import train_group  # Ray Train takes a second to import

    with cluster.ray_session(), tempfile.TemporaryDirectory(prefix="segue-") as storage:
        interrupt.install()  # Ray takes SIGTERM for itself
        threads = ready.spec.threads or max(1, cluster.num_cluster_cpus() // num_processes)
        train_group(replace(ready.spec, threads=threads), num_processes, threads, storage)


def _with_held_out_files(draft: JobDraft, config: FinetuneConfig) -> JobDraft:
    """Held-out files are read and planned like the others. Nothing is passed through."""
    rows, output = draft.input or config.input, draft.output or config.output
    rows = rows.model_copy(update={"path": (*rows.path, *(config.evaluation.path or ()))})
    output = output.model_copy(update={"columns": ()})
    config = config.model_copy(update={"input": rows, "output": output})
    return replace(draft, config=config, input=rows, output=output)


def _problems(config: FinetuneConfig) -> list[Problem]:
    problems = []
    if is_echo(config.model.source):
        problems.append(Problem("model.source", "'echo'", "a model with weights"))
    if config.model.adapter is not None:
        wanted = "it left out: an adapter is trained on the model itself"
        problems.append(Problem("model.adapter", "an adapter", wanted))
    if config.evaluation.path is not None and config.input.limit is not None:
        wanted = "it left out: with files of their own held out, it does not say which rows it counts"
        problems.append(Problem("input.limit", str(config.input.limit), wanted))
    return problems


def _holdout(config: FinetuneConfig, job: ReadyJob) -> Holdout:
    evaluation = config.evaluation
    src_paths = None
    if evaluation.path is not None:
        held_out = {file.path for file in discover(evaluation.path)}
        src_paths = frozenset(file.src_path for file in job.checked.inputs if file.path in held_out)
    return Holdout(src_paths, evaluation.fraction, evaluation.max_examples, config.seed)


def _summary(ready: ReadyFinetune, status: str, exit_code: int = 0) -> FinetuneSummary:
    """From what the training left: its result, else its last metrics."""
    store = ready.job.store
    if store.exists(SUCCESS):
        result = json.loads(store.read(SUCCESS))
        return FinetuneSummary(status, store.path(""), store.path(ADAPTER), exit_code, **result)
    steps = [line for line in read_metrics(store.root / METRICS) if "loss" in line]
    last = steps[-1] if steps else {"step": 0, "num_steps": 0}
    return FinetuneSummary(status, store.path(""), None, exit_code, steps=last["step"], num_steps=last["num_steps"])


@contextmanager
def _watched(path: str, show: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Lines of the metrics go to `show` as they come, from whatever process writes them."""
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(path, show, done), name="segue-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


def _watch(path: str, show: Callable[[dict[str, Any]], None], done: threading.Event) -> None:
    from pathlib import Path

    shown = len(read_metrics(Path(path)))
    while True:
        is_last = done.wait(WATCH_SECONDS)
        lines = read_metrics(Path(path))
        for line in lines[min(shown, len(lines)) :]:
            show(line)
        shown = len(lines)
        if is_last:
            return
