"""A fine-tuning job from its file to an adapter: checked and planned like any job, then trained in this process, or in
several through Ray Train if `workers.max_size` says so.

Whatever ends it, running it again goes on from the latest checkpoint.
"""

import fcntl
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from segue.pipeline.dataset.files import discover
from segue.pipeline.dataset.listing import is_local
from segue.pipeline.jobfile.read import JobDraft, keys_of, read_job
from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.jobfile.training import FinetuneConfig
from segue.pipeline.ledger.manifest import SUCCESS, ForeignOutput, check_same_fields
from segue.pipeline.problems import JobRefused, Problem, shown
from segue.pipeline.processes import ray_session
from segue.pipeline.processes.interrupt import Interrupt
from segue.pipeline.processes.progress import Say
from segue.pipeline.prompts.check import checked_encoder
from segue.pipeline.ready.job import IDENTITY_DIGITS, ReadyJob, prepared, today
from segue.pipeline.run.pool import threads_of
from segue.pipeline.run.run import plan_job
from segue.pipeline.storage.models import local_source
from segue.pipeline.storage.store import OutputStorageError
from segue.pipeline.train.examples import FINISH_REASON, Holdout
from segue.pipeline.train.metrics import METRICS, read_metrics
from segue.pipeline.train.process import ADAPTER, NothingToTrain, TrainingSpec, check_data, train_process
from segue.workers.errors import ModelRefused, RowError
from segue.workers.models.echo import is_echo
from segue.workers.training.model import check_trainable
from segue.workers.training.params import TrainingParams
from segue.workers.training.ranks import Ranks

WATCH_SECONDS = 1.0
TRAINING = "_job/training.json"  # how it is trained, beside the plan
LOCK = "_job/training.lock"


@dataclass(frozen=True)
class ReadyFinetune:
    """A training that may be planned and run."""

    job: ReadyJob
    config: FinetuneConfig
    spec: TrainingSpec

    @property
    def folder(self) -> Path:
        """The output folder: checkpoints and metrics want a local one."""
        return Path(self.config.output.path)


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


def is_training(path: str | os.PathLike[str]) -> bool:
    """Whether a job file has sections that only a training has. Raises JobRefused if it cannot be read."""
    return bool(keys_of(path) & (FinetuneConfig.model_fields.keys() - JobConfig.model_fields.keys()))


def prepare_finetune(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), others: Sequence[Problem] = ()
) -> ReadyFinetune:
    """Read and check a job file. Raises JobRefused with `others`, which the caller found, and every other problem."""
    draft = read_job(path, overrides, FinetuneConfig)
    config = draft.config
    if not isinstance(config, FinetuneConfig):
        prepared(draft, others)  # tells what else is wrong
        raise JobRefused(draft.problems)
    held_out, problems = _held_out_files(config)
    job = prepared(_with_files(draft, config, held_out), [*others, *_problems(config), *problems])
    spec = _training_spec(config, job, held_out)
    try:
        check_trainable(local_source(spec.source), spec.revision, spec.lora, spec.answer_end_id)
    except ModelRefused as error:
        raise JobRefused([Problem("", "", str(error))]) from None
    return ReadyFinetune(job, config, spec)


def run_finetune(ready: ReadyFinetune, say: Say, show: Callable[[dict[str, Any]], None]) -> FinetuneSummary:
    """Plan if needed, and train what is missing. `show` is told each line of the metrics.

    Raises ForeignOutput, InputChanged, InputUnreadable, WorkersFailed, ClusterUnavailable, OutputStorageError,
    JobRefused for data that is not enough, TrainingDiverged.
    """
    store = ready.job.store
    plan_job(ready.job, say)
    if store.exists(SUCCESS):
        _check_training(ready)
        if not (ready.folder / ADAPTER).is_dir():
            raise OutputStorageError(f"{store.path(ADAPTER)} is gone although {store.path(SUCCESS)} says it was there")
        return _summary(ready, "already_complete")
    try:
        data = check_data(ready.spec)
    except NothingToTrain as error:
        raise JobRefused([Problem("", "", str(error))]) from None
    _check_training(ready)
    with Interrupt() as interrupt, _alone(ready.folder), _watched(ready.folder / METRICS, show):
        interrupt.on_set = lambda: say("interrupted: the step at work is finished and saved; interrupt again to stop")
        if ready.config.workers.max_size == 1:
            train_process(ready.spec, Ranks(), lambda: interrupt.is_set, data)
        else:
            _train_group(ready, interrupt)
    if store.exists(SUCCESS):
        return _summary(ready, "done")
    return _summary(ready, "interrupted", interrupt.exit_code)


def _train_group(ready: ReadyFinetune, interrupt: Interrupt) -> None:
    from segue.pipeline.train.group import train_group  # Ray Train takes a second to import

    with ray_session.ray_session(), tempfile.TemporaryDirectory(prefix="segue-") as storage:
        interrupt.install()  # Ray takes SIGTERM for itself
        threads = threads_of(ready.config.workers)
        spec = replace(ready.spec, threads=threads)
        train_group(spec, ready.config.workers.max_size, threads, storage, interrupt)


def _check_training(ready: ReadyFinetune) -> None:
    """What was learned in this folder, and how, written down when the first training starts.

    Not in the plan, which knows rows only: what a training is refused for must not bind the folder. Raises
    ForeignOutput naming what differs.
    """
    spec = ready.spec
    fields = {
        "answer_end_id": spec.answer_end_id,
        "lora": spec.lora.model_dump(mode="json"),
        "training": spec.training.model_dump(mode="json", exclude=TrainingParams.WITHOUT_EFFECT),
        "evaluation": asdict(spec.holdout) | {"src_paths": sorted(spec.holdout.src_paths or ())},
    }
    store = ready.job.store
    store.create(TRAINING, json.dumps(fields, indent=1, sort_keys=True).encode())
    check_same_fields(json.loads(store.read(TRAINING)), fields, ready.config.output.path)


def _training_spec(config: FinetuneConfig, job: ReadyJob, held_out: frozenset[str] | None) -> TrainingSpec:
    encoder = checked_encoder(job.render_spec(today()))
    try:
        answer_end_id = encoder.answer_end_id()
    except (ValueError, RowError) as error:
        raise JobRefused([Problem("prompt", "", str(error))]) from error
    src_paths = None
    if held_out is not None:
        src_paths = frozenset(file.src_path for file in job.checked.inputs if _real(file.path) in held_out)
    source = config.model.source
    return TrainingSpec(
        output=config.output.path,
        source=source,
        revision=job.facts.commit or config.model.revision,
        dtype=job.facts.dtype,
        lora=config.lora,
        training=config.training,
        holdout=Holdout(src_paths, config.evaluation.fraction, config.evaluation.max_examples, config.seed),
        max_error_rate=config.limits.max_error_rate,
        seed=config.seed,
        answer_end_id=answer_end_id,
        record=encoder.record(
            job.mask,
            base_model=os.path.basename(source) if os.path.isabs(source) else source,
            base_identity=job.facts.identity[:IDENTITY_DIGITS],
        ),
        threads=config.workers.threads,
        device=_device_of(config),
    )


def _device_of(config: FinetuneConfig) -> str:
    """Of a training in one process, what it finds or is told; several share nothing but CPUs."""
    gpus, is_alone = config.workers.num_gpus, config.workers.max_size == 1
    return "cuda" if gpus not in ("auto", 0) else "auto" if gpus == "auto" and is_alone else "cpu"


def _held_out_files(config: FinetuneConfig) -> tuple[frozenset[str] | None, list[Problem]]:
    """The real paths of held-out files, None if there are none of their own."""
    if config.evaluation.path is None:
        return None, []
    try:
        return frozenset(_real(file.path) for file in discover(config.evaluation.path)), []
    except JobRefused as refused:
        return frozenset(), [replace(problem, key="evaluation.path") for problem in refused.problems]


def _with_files(draft: JobDraft, config: FinetuneConfig, held_out: frozenset[str] | None) -> JobDraft:
    """Held-out files are read and planned like the others, with no more columns than a training reads."""
    rows, output = draft.input or config.input, draft.output or config.output
    rows = rows.model_copy(update={"path": (*rows.path, *(config.evaluation.path or ())) if held_out else rows.path})
    output = output.model_copy(update={"columns": _columns(rows.path)})
    config = config.model_copy(update={"input": rows, "output": output})
    return replace(draft, config=config, input=rows, output=output)


def _columns(paths: Sequence[str]) -> tuple[str, ...]:
    """Whether answers were cut off, if every file says so."""
    try:
        files = discover(paths)
    except JobRefused:
        return ()  # it will be refused for that
    return (FINISH_REASON,) if files and all(FINISH_REASON in file.schema.names for file in files) else ()


def _problems(config: FinetuneConfig) -> list[Problem]:
    problems = []
    if is_echo(config.model.source):
        problems.append(Problem("model.source", "'echo'", "a model with weights"))
    if config.model.adapter is not None:
        wanted = "it left out: an adapter is trained on the model itself"
        problems.append(Problem("model.adapter", "an adapter", wanted))
    if config.model.quantization is not None:
        wanted = "it left out: an adapter is trained over plain weights"
        problems.append(Problem("model.quantization", shown(config.model.quantization), wanted))
    if config.workers.num_gpus not in ("auto", 0) and config.workers.max_size > 1:
        wanted = "auto or 0: a training in several processes uses CPUs"
        problems.append(Problem("workers.num_gpus", f"{config.workers.num_gpus:g}", wanted))
    if not is_local(config.output.path):
        problems.append(Problem("output.path", shown(config.output.path), "a local folder: checkpoints are kept in it"))
    if config.evaluation.path is not None:
        wanted = "it left out: files of their own are held out"
        chosen = config.input.model_dump(include={"filters", "sample", "limit"}, exclude_none=True)
        given = {f"input.{name}": True for name in chosen}
        given["evaluation.fraction"] = "fraction" in config.evaluation.model_fields_set
        problems += [Problem(key, "a value", wanted) for key, is_given in given.items() if is_given]
    foreign = {f"workers.{name}" for name in config.workers.model_fields_set - {"min_size", "max_size", "threads"}}
    foreign -= {"workers.num_gpus"}
    foreign |= {"output.columns"} & {f"output.{name}" for name in config.output.model_fields_set}
    problems += [Problem(key, "a value", "it left out: it means nothing to a training") for key in sorted(foreign)]
    return problems


def _real(path: str) -> str:
    return os.path.realpath(path) if is_local(path) else path


def _summary(ready: ReadyFinetune, status: str, exit_code: int = 0) -> FinetuneSummary:
    """From what the training left: its result, else its last metrics."""
    store = ready.job.store
    if store.exists(SUCCESS):
        result = json.loads(store.read(SUCCESS))
        return FinetuneSummary(status, store.path(""), store.path(ADAPTER), exit_code, **result)
    steps = [line for line in read_metrics(ready.folder / METRICS) if "loss" in line]
    last = steps[-1] if steps else {"step": 0, "num_steps": 0}
    return FinetuneSummary(status, store.path(""), None, exit_code, steps=last["step"], num_steps=last["num_steps"])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises ForeignOutput if another training is at work in the folder."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ForeignOutput(f"output.path: another training is at work in {folder}") from None
        yield


@contextmanager
def _watched(path: Path, show: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Lines of the metrics go to `show` as they come, from whatever process writes them."""
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(path, show, done), name="segue-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


def _watch(path: Path, show: Callable[[dict[str, Any]], None], done: threading.Event) -> None:
    """Reads what is new; a resumed training writes the file anew, with the lines of the steps that it has."""
    known = max((line["step"] for line in read_metrics(path)), default=0)
    position, inode = 0, -1
    while True:
        is_last = done.wait(WATCH_SECONDS)
        if path.is_file():
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_ino != inode:
                    position, inode = 0, os.fstat(file.fileno()).st_ino
                file.seek(position)
                *lines, _ = file.read().split(b"\n")
            position += sum(len(line) + 1 for line in lines)
            for line in map(json.loads, lines):
                if line["step"] > known:
                    show(line)
        if is_last:
            return
