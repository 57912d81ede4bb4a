"""A fine-tuning job from its file to an adapter: checked and planned like any job, then trained.

The training runs in this process, or in several processes of Ray Train if `workers.max_size` is above 1. However it
ends, running it again goes on from the latest checkpoint.
"""

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from segue.pipeline.dataset.files import discover
from segue.pipeline.dataset.listing import is_local, list_files
from segue.pipeline.jobfile.read import JobDraft, read_job
from segue.pipeline.jobfile.training import FinetuneConfig
from segue.pipeline.ledger.manifest import SUCCESS, ForeignOutput, check_same_fields
from segue.pipeline.ledger.training_metrics import read_metrics
from segue.pipeline.problems import JobRefused, Problem, shown
from segue.pipeline.processes import ray_session
from segue.pipeline.processes.interrupt import Interrupt
from segue.pipeline.processes.limited import LimitedProcess
from segue.pipeline.processes.progress import Say
from segue.pipeline.processes.reservation import threads_of
from segue.pipeline.prompts.check import checked_encoder
from segue.pipeline.ready.job import ReadyJob, ready_job, today
from segue.pipeline.ready.model import IDENTITY_DIGITS
from segue.pipeline.run.run import plan_job
from segue.pipeline.storage.folder import LocalStore
from segue.pipeline.storage.models import local_source
from segue.pipeline.storage.store import OutputStorageError
from segue.pipeline.train.examples import FINISH_REASON, Holdout
from segue.pipeline.train.metrics import watched_metrics
from segue.pipeline.train.process import ADAPTER, NothingToTrain, TrainingSpec, check_data, train_process
from segue.workers.errors import ModelRefused, RowError
from segue.workers.models.echo import is_echo
from segue.workers.training.model import check_trainable
from segue.workers.training.params import TrainingParams
from segue.workers.training.ranks import Ranks

TRAINING_RECORD = "_job/training.json"  # the training's parameters, beside the plan
LOCK = "_job/training.lock"


@dataclass(frozen=True)
class ReadyFinetune:
    """A training that may be planned and run."""

    job: ReadyJob
    config: FinetuneConfig
    spec: TrainingSpec

    @property
    def folder(self) -> Path:
        """The output folder. It is local, as checkpoints and metrics require."""
        return Path(self.config.output.path)


@dataclass(slots=True)
class FinetuneSummary:
    """The result of `segue finetune`."""

    status: str  # done | already_complete | interrupted
    output: str
    adapter: str | None = None  # the folder to name in `model.adapter`
    exit_code: int = 0
    steps: int = 0
    num_steps: int = 0  # of the whole training, unless it stops early
    stopped_early: bool = False
    examples: int = 0
    held_out: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # rows that could not be used, by error code
    eval_loss: float | None = None  # of the kept adapter, in nats per answer token
    best_step: int | None = None
    tokens: int = 0  # fed in all steps together
    training_seconds: float = 0.0
    tokens_per_second: float = 0.0


def prepare_finetune(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    others: Sequence[Problem] = (),
    child: LimitedProcess | None = None,
) -> ReadyFinetune:
    """Read and check a job file. `others` and `child` are as for `ready_job`. Raises JobRefused with every problem."""
    job = ready_job(path, overrides, read=_read_training, others=others, child=child)
    config = job.config
    assert isinstance(config, FinetuneConfig)
    spec = _training_spec(config, job)
    try:
        check_trainable(local_source(spec.source), spec.revision, spec.lora, spec.answer_end_id)
    except ModelRefused as error:
        raise JobRefused([Problem("", "", str(error))]) from None
    return ReadyFinetune(job, config, spec)


def run_finetune(
    ready: ReadyFinetune, say: Say, show: Callable[[dict[str, Any]], None], child: LimitedProcess | None = None
) -> FinetuneSummary:
    """Plan if needed, then train the missing steps. `show` gets each line of the metrics. `child`: the one that checked
    the job.

    Raises ForeignOutput, InputChanged, InputUnreadable, WorkersFailed, ClusterUnavailable, OutputStorageError,
    TrainingDiverged, and JobRefused if there are too few examples.
    """
    store = ready.job.store
    plan_job(ready.job, say, child)
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
    with Interrupt() as interrupt, _locked(ready.folder), watched_metrics(LocalStore(ready.folder), show):
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
    """Compare the training's parameters with those of the first training in this folder, which writes them down.

    They are not part of the plan: a training that is refused must not bind the folder to its parameters. Raises
    ForeignOutput, which names what differs.
    """
    spec = ready.spec
    fields = {
        "answer_end_id": spec.answer_end_id,
        "lora": spec.lora.model_dump(mode="json"),
        "training": spec.training.model_dump(mode="json", exclude=TrainingParams.WITHOUT_EFFECT),
        "evaluation": asdict(spec.holdout) | {"src_paths": sorted(spec.holdout.src_paths or ())},
    }
    store = ready.job.store
    store.create(TRAINING_RECORD, json.dumps(fields, indent=1, sort_keys=True).encode())
    check_same_fields(json.loads(store.read(TRAINING_RECORD)), fields, ready.config.output.path)


def _training_spec(config: FinetuneConfig, job: ReadyJob) -> TrainingSpec:
    encoder = checked_encoder(job.render_spec(today()))
    try:
        answer_end_id = encoder.answer_end_id()
    except (ValueError, RowError) as error:
        raise JobRefused([Problem("prompt", "", str(error))]) from error
    source = config.model.source
    return TrainingSpec(
        output=config.output.path,
        source=source,
        revision=job.facts.commit or config.model.revision,
        dtype=job.facts.dtype,
        lora=config.lora,
        training=config.training,
        holdout=Holdout(
            _held_out_paths(config, job), config.evaluation.fraction, config.evaluation.max_examples, config.seed
        ),
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
    """The device of a training: in one process what is asked for, in several processes always CPUs."""
    gpus, is_alone = config.workers.num_gpus, config.workers.max_size == 1
    return "cuda" if gpus not in ("auto", 0) else "auto" if gpus == "auto" and is_alone else "cpu"


def _read_training(path: str | os.PathLike[str], overrides: Sequence[str]) -> JobDraft:
    """The job file, with what a training does not allow among its problems. Held-out files are read and planned like
    the others, with no more columns than a training reads."""
    draft = read_job(path, overrides, FinetuneConfig)
    config = draft.config
    if not isinstance(config, FinetuneConfig):
        return draft
    held_out = _check_held_out(config)
    paths = config.input.path if held_out else (*config.input.path, *(config.evaluation.path or ()))
    rows = config.input.model_copy(update={"path": paths})
    output = config.output.model_copy(update={"columns": _columns(paths)})
    problems = (*_problems(config), *held_out)
    config = config.model_copy(update={"input": rows, "output": output})
    return replace(draft, config=config, input=rows, output=output, problems=problems)


def _check_held_out(config: FinetuneConfig) -> list[Problem]:
    """Whether the held-out files that are named can be read."""
    if config.evaluation.path is None:
        return []
    try:
        discover(config.evaluation.path)
    except JobRefused as refused:
        return [replace(problem, key="evaluation.path") for problem in refused.problems]
    return []


def _held_out_paths(config: FinetuneConfig, job: ReadyJob) -> frozenset[str] | None:
    """The `src_path` of each held-out file, None if none is named."""
    if config.evaluation.path is None:
        return None
    held_out = {_real(file.path) for path in config.evaluation.path for file in list_files(path).files}
    return frozenset(file.src_path for file in job.checked.inputs if _real(file.path) in held_out)


def _columns(paths: Sequence[str]) -> tuple[str, ...]:
    """The column that says whether an answer was cut off, if every file has it."""
    try:
        files = discover(paths)
    except JobRefused:
        return ()  # the check of the input reports it
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
    """The summary of a training from its result; if it is not done, from its last metrics."""
    store = ready.job.store
    if store.exists(SUCCESS):
        result = json.loads(store.read(SUCCESS))
        return FinetuneSummary(status, store.path(""), store.path(ADAPTER), exit_code, **result)
    steps = [line for line in read_metrics(store) if "loss" in line]
    last = steps[-1] if steps else {"step": 0, "num_steps": 0}
    return FinetuneSummary(status, store.path(""), None, exit_code, steps=last["step"], num_steps=last["num_steps"])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within the block no other training can work in the folder. Raises ForeignOutput if one does already."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ForeignOutput(f"output.path: another training is at work in {folder}") from None
        yield
