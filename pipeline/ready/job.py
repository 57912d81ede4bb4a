"""A checked job made ready to plan or run: model looked at, mask and precision resolved, fingerprint computed.

Everything that can be refused before work is refused here, all problems at once. Starts no Ray.
"""

import datetime
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from segue.pipeline.dataset.columns import ROW_PARAMS_COLUMN
from segue.pipeline.jobfile.read import JobDraft, read_job
from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.ledger.manifest import Manifest, check_same_job, code_version, fingerprint, load_manifest
from segue.pipeline.ledger.shards import PROTOCOL
from segue.pipeline.problems import JobRefused, Problem
from segue.pipeline.processes import ray_session
from segue.pipeline.processes.limited import ChildDied
from segue.pipeline.prompts.check import adapter_record, config_facts
from segue.pipeline.prompts.render import RenderSpec
from segue.pipeline.prompts.rows import offer_child
from segue.pipeline.ready.checks import CheckedJob, input_identity, look_over, refused
from segue.pipeline.ready.child import CHECK_SECONDS, checking_process, found_in_child, handed_over
from segue.pipeline.ready.trial import Sample, check_sample, sample_of
from segue.pipeline.run.worker import WorkerSpec
from segue.pipeline.storage.models import local_source
from segue.pipeline.storage.store import Store, open_store
from segue.workers.devices.gpus import num_gpus_here
from segue.workers.devices.memory import GPU_KV_SHARE, KV_SHARE, free_memory_bytes
from segue.workers.errors import ModelRefused
from segue.workers.models.adapter_record import AdapterRecord
from segue.workers.models.echo import is_echo
from segue.workers.models.facts import ConfigFacts, FoundModel, ModelFacts, find_model, inspect_model

IDENTITY_DIGITS = 16  # of a model, in an adapter's record
GIB = 2**30


@dataclass(frozen=True)
class ReadyJob:
    """A job that may be planned and run."""

    checked: CheckedJob
    facts: ModelFacts
    mask: str  # resolved: segment or causal
    fields: dict[str, Any]  # the fingerprint's
    sample: Sample = field(default_factory=Sample)

    @property
    def config(self) -> JobConfig:
        return self.checked.config

    @property
    def store(self) -> Store:
        return open_store(self.config.output.path)

    @property
    def max_model_len(self) -> int:
        return min(self.config.limits.max_model_len or self.facts.max_model_len, self.facts.max_model_len)

    @property
    def warns_of_unadapted_mask(self) -> bool:
        """Whether the segment mask was asked for on a model that, as far as is known, never saw it."""
        return self.mask == "segment" and self.facts.adapter_mask != "segment" and not is_echo(self.config.model.source)

    @property
    def has_row_params(self) -> bool:
        return self.config.task == "generate" and ROW_PARAMS_COLUMN in self.checked.columns.schema.names

    def render_spec(self, date: str) -> RenderSpec:
        """For the plan's tasks."""
        return RenderSpec(
            source=self.config.model.source,
            revision=self.facts.commit or self.config.model.revision,
            template=self.checked.template,
            date=date,
            mask=self.mask,
            max_model_len=self.max_model_len,
            window=self.facts.window,
            max_prompt_bytes=self.config.limits.max_prompt_bytes,
            prompt_columns=self.checked.columns.prompt,
            passed_columns=self.checked.columns.passed,
            params=self.config.sampling_params,
            task=self.config.task,
            scoring=self.config.scoring_template(),
        )

    def worker_spec(self, threads: int, workers_a_node: int = 1, num_gpus: float = 0.0) -> WorkerSpec:
        """For the pool's actors. Those with a GPU, or a part of one, have no CPU to fall back on."""
        workers = self.config.workers
        given = workers.model_dump(
            include={"max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes", "enable_prefix_caching"},
            exclude_none=True,
        )
        share = GPU_KV_SHARE * min(1.0, num_gpus) if num_gpus else KV_SHARE / workers_a_node
        return WorkerSpec(
            name=self.config.name,
            output=self.config.output.path,
            fingerprint=fingerprint(self.fields),
            source=self.config.model.source,
            revision=self.facts.commit or self.config.model.revision,
            adapter=self.config.model.adapter,
            dtype=self.facts.dtype,
            quantization=self.config.model.quantization,
            mask=self.mask,
            task=self.config.task,
            params=self.config.sampling_params,
            has_row_params=self.has_row_params,
            max_model_len=self.max_model_len,
            engine={**given, "seed": self.config.seed, "kv_memory_share": share},
            threads=threads,
            device="cuda" if num_gpus else "cpu",
            device_map="auto" if num_gpus > 1 else None,
        )


def prepare(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    others: Sequence[Problem] = (),
    *,
    runs_here: bool = False,
    meanwhile: Callable[[JobConfig], object] | None = None,
) -> ReadyJob:
    """Read and check a job file. `runs_here`: also whether its workers fit into this machine. `meanwhile` is called
    when all that is left is done in a child process, which is getting ready for it; not before data is filtered.

    Raises JobRefused with `others`, which the caller found, and every problem of file, data, output and model.
    """
    return prepared(read_job(path, overrides), others, runs_here=runs_here, meanwhile=meanwhile)


def prepared(
    draft: JobDraft,
    others: Sequence[Problem] = (),
    *,
    runs_here: bool = False,
    meanwhile: Callable[[JobConfig], object] | None = None,
) -> ReadyJob:
    """`prepare` for a job file as read. Raises JobRefused with `others`, which the caller found, and every other."""
    config = draft.config
    if config:
        checking_process(config).begin()  # it loads while the data is looked at
    select, of_data = look_over(draft, has_gpu=num_gpus_here() > 0)
    found, of_model = _find_model(config) if config else (None, [])
    of_gpus = _check_gpus(config) if config and ray_session.is_local() else []
    free_bytes = free_memory_bytes() if runs_here else None  # before anything else is started here
    if select and config and not config.input.filters and not (others or of_model or of_gpus) and meanwhile:
        meanwhile(config)
    facts: ModelFacts | None = None
    if config and found:
        facts, of_config = _look_at_model(config, found)
        of_model += of_config
    if config and facts and free_bytes is not None:
        of_gpus += _check_fits(config, facts, free_bytes)
    if select is None or facts is None or others or of_model or of_gpus:
        raise refused(draft, [*others, *of_model, *of_gpus, *of_data])
    checked = select()
    mask = facts.adapter_mask or "causal" if checked.config.mask == "auto" else checked.config.mask
    ready = ReadyJob(checked, facts, mask, fingerprint_fields(checked, facts, mask))
    spec = ready.render_spec(today())
    _check_adapter(ready, _checked_record(ready, spec))
    sample = sample_of(checked, spec, checking_process(checked.config))
    if problems := check_sample(checked, sample):
        raise JobRefused(problems)
    offer_child(spec, functools.partial(handed_over, checked.config))
    return replace(ready, sample=sample)


def _checked_record(job: ReadyJob, spec: RenderSpec) -> AdapterRecord:
    """What an adapter trained with the job's prompts would say of them. Raises JobRefused if they cannot be rendered.

    A chat template is a program, and a model's is a stranger's: it is first run where it can be ended.
    """
    memory = job.config.limits.row_memory_bytes
    try:
        return found_in_child(job.config, adapter_record, spec, job.facts.identity[:IDENTITY_DIGITS])
    except (ValueError, OSError) as error:
        raise JobRefused([Problem("prompt", "", str(error))]) from error
    except ChildDied as died:
        got = {
            "time": f"a chat template that takes longer than {CHECK_SECONDS:g} s for one message",
            "memory": f"a chat template that takes more than limits.row_memory_bytes, {memory:,}, for one message",
            "crash": "a tokenizer or chat template that ends its process",
        }[died.death]
        raise JobRefused([Problem("prompt", got, "one that renders")]) from None


def _check_adapter(job: ReadyJob, own: AdapterRecord) -> None:
    """Raises JobRefused if the adapter says that it was trained with another mask or other prompts."""
    record = job.facts.adapter_record
    differing = record.differences(own) if record and job.config.model.check_adapter else []
    if differing:
        wanted = "what the adapter was trained with (its segue.json)"
        hint = "change the job, or set model.check_adapter: false to run it all the same"
        raise JobRefused([Problem("model.adapter", each, wanted, hint) for each in differing])


def existing_manifest(job: ReadyJob) -> Manifest | None:
    """The plan in the output folder, if there is one. Raises ForeignOutput if it is another job's."""
    manifest = load_manifest(job.store)
    if manifest is not None:
        check_same_job(manifest, job.fields, job.config.output.path)
    return manifest


def today() -> str:
    """The date a new plan is frozen at."""
    return datetime.date.today().isoformat()


def _find_model(config: JobConfig) -> tuple[FoundModel | None, list[Problem]]:
    model = config.model
    try:
        source, adapter = local_source(model.source), model.adapter and local_source(model.adapter, "model.adapter")
        return find_model(source, adapter=adapter, revision=model.revision), []
    except ModelRefused as error:
        return None, [Problem("model", "", str(error))]


def _look_at_model(config: JobConfig, found: FoundModel) -> tuple[ModelFacts | None, list[Problem]]:
    model = config.model
    look = functools.partial(_config_facts, config)
    try:
        facts = inspect_model(
            found, look, dtype=model.dtype, quantization=model.quantization, on_gpu=_is_on_gpu(config)
        )
    except ModelRefused as error:
        return None, [Problem("model", "", str(error))]
    except ChildDied as died:
        got = {
            "time": f"a configuration or tokenizer that takes longer than {CHECK_SECONDS:g} s to load",
            "memory": "a configuration or tokenizer that takes more than limits.row_memory_bytes",
            "crash": "a configuration or tokenizer that ends its process",
        }[died.death]
        return None, [Problem("model", got, "one that can be loaded")]
    problems = []
    wanted_length = config.limits.max_model_len
    if wanted_length is not None and wanted_length > facts.max_model_len:
        limit = f"at most the model's own {facts.max_model_len}"
        problems.append(Problem("limits.max_model_len", str(wanted_length), limit))
    return facts, problems


def _config_facts(config: JobConfig, directory: Path, **wanted: Any) -> ConfigFacts:
    return found_in_child(config, config_facts, directory, wanted)


def _is_on_gpu(config: JobConfig) -> bool | None:
    """Whether workers compute on GPUs; None if that is for the cluster to tell."""
    return None if config.workers.num_gpus == "auto" else config.workers.num_gpus > 0


def _check_gpus(config: JobConfig) -> list[Problem]:
    """Whether this machine has as many as a worker wants."""
    if config.workers.num_gpus == "auto" or config.workers.num_gpus <= (there := num_gpus_here()):
        return []
    wanted = f"auto, 0, or at most the {there} that torch sees on this machine"
    hint = "a cluster in RAY_ADDRESS, or a CUDA build of torch"
    return [Problem("workers.num_gpus", f"{config.workers.num_gpus:g}", wanted, hint)]


def _check_fits(config: JobConfig, facts: ModelFacts, free: int) -> list[Problem]:
    """Whether the weights of the fewest workers fit into what this machine has free, in bytes."""
    if _is_on_gpu(config) or (_is_on_gpu(config) is None and num_gpus_here()):
        return []  # a GPU's memory is another
    workers = config.workers.min_size
    if workers * facts.weight_bytes <= free:
        return []
    got = f"weights of {facts.weight_bytes / GIB:,.1f} GiB in {facts.dtype}, for each of {workers} workers"
    wanted = f"what fits into the {free / GIB:,.1f} GiB that this machine has free"
    hint = "fewer workers.min_size, model.dtype: bfloat16, or a cluster in RAY_ADDRESS"
    return [Problem("model", got, wanted, hint)]


def fingerprint_fields(checked: CheckedJob, facts: ModelFacts, mask: str) -> dict[str, Any]:
    """Everything that changes results, under the names of the job file."""
    config = checked.config
    return {
        "protocol": PROTOCOL,
        "code": code_version(),
        "task": config.task,
        "model": facts.identity,
        "model.adapter": facts.adapter_identity,
        "model.dtype": facts.dtype,
        "model.quantization": config.model.quantization,
        "mask": mask,
        "seed": config.seed,
        "prompt": checked.template.model_dump(mode="json"),
        **_what_is_asked(config),
        "limits.max_model_len": config.limits.max_model_len,
        "limits.max_prompt_bytes": config.limits.max_prompt_bytes,
        "input.limit": config.input.limit,
        **_what_is_selected(config),
        "input.files": input_identity(checked.inputs),
        **_what_is_tried_again(checked),
        "plan.window_rows": config.plan.window_rows,
        "output.columns": list(checked.columns.passed),
        "output.max_rows_per_file": config.output.max_rows_per_file,
        "output.max_bytes_per_file": config.output.max_bytes_per_file,
    }


def _what_is_asked(config: JobConfig) -> dict[str, Any]:
    """Of the two sections that tasks have of their own, the task's."""
    if config.task == "generate":
        return {"sampling_params": config.sampling_params.model_dump(mode="json")}
    scoring = config.scoring_template()
    delimiter = scoring.delimiter(config.prompt.format)
    return {"scoring": scoring.model_dump(mode="json") | {"target_delimiter": delimiter}}


def _what_is_selected(config: JobConfig) -> dict[str, Any]:
    chosen = config.input.model_dump(mode="json", include={"filters", "sample"}, exclude_none=True)
    return {f"input.{name}": value for name, value in chosen.items()}


def _what_is_tried_again(checked: CheckedJob) -> dict[str, Any]:
    if checked.failed is None:
        return {}
    return {"input.retry_of": f"rows {checked.failed.identity} of job {checked.failed.fingerprint}"}
