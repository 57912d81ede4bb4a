"""From a job file to a job that can be planned and run: one function, every check, all problems at once.

Everything that can be refused before work is refused here. Starts nothing but the checking child; knows no Ray.
"""

import datetime
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from segue.pipeline.dataset.columns import ROW_PARAMS_COLUMN
from segue.pipeline.dataset.selection import selected_rows
from segue.pipeline.jobfile.read import JobDraft, read_job
from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.ledger.manifest import Manifest, check_same_job, fingerprint, load_manifest
from segue.pipeline.problems import Problem
from segue.pipeline.processes.address import is_local
from segue.pipeline.processes.limited import LimitedProcess
from segue.pipeline.prompts.render import RenderSpec
from segue.pipeline.ready.checks import CheckedJob, check_data
from segue.pipeline.ready.child import begin_check, checking_child
from segue.pipeline.ready.fingerprint import fingerprint_fields
from segue.pipeline.ready.model import check_model, check_prompts, check_reasoning, search_model
from segue.pipeline.ready.trial import Trial, try_rows
from segue.pipeline.ready.worker_spec import WorkerSpec
from segue.pipeline.storage.open import open_store
from segue.pipeline.storage.store import Store
from segue.workers.devices.gpus import num_gpus_here
from segue.workers.devices.memory import GPU_KV_SHARE, KV_SHARE
from segue.workers.models.echo import is_echo
from segue.workers.models.facts import ModelFacts
from segue.workers.prompts.reasoning import ReasoningMarkers

IDENTITY_DIGITS = 16  # of a model, in an adapter's record
GIB = 2**30


@dataclass(frozen=True)
class ReadyJob:
    """A job that may be planned and run."""

    checked: CheckedJob
    facts: ModelFacts
    mask: str  # resolved: segment or causal
    fields: dict[str, Any]  # the fingerprint's
    trial: Trial = field(default_factory=Trial)
    reasoning: ReasoningMarkers | None = None  # by which it is split from answers, if the job wants that

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
            reasoning=self.reasoning,
            engine={**given, "seed": self.config.seed, "kv_memory_share": share},
            threads=threads,
            drain_timeout_s=workers.drain_timeout_s,
            device="cuda" if num_gpus else "cpu",
            device_map="auto" if num_gpus > 1 else None,
        )


class ReadJob(Protocol):
    """How a job file is read: `read_job`, or what reads another kind of job."""

    def __call__(self, path: str | os.PathLike[str], overrides: Sequence[str]) -> JobDraft: ...


def ready_job(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    read: ReadJob = read_job,
    others: Sequence[Problem] = (),
    child: LimitedProcess | None = None,
    runs_here: bool = False,
    meanwhile: Callable[[JobConfig], object] | None = None,
) -> ReadyJob:
    """Read a job file and check all of it.

    `others`: problems that the caller found. `child`: the caller's `checking_child`, which has the tokenizer loaded
    afterwards; without one, a child is started and ended. `runs_here`: whether the workers must fit into this machine.
    `meanwhile` is called when only the model's configuration, the prompts and the rows can still be refused.

    Raises JobRefused with `others` and every problem of file, data, output and model; InputChanged, InputUnreadable.
    """
    with nullcontext(child) if child else checking_child() as child:
        draft = read(path, overrides)
        config = draft.config
        if config is not None:
            begin_check(child, config)  # it imports while the data is looked at
        data = check_data(draft, has_gpu=num_gpus_here() > 0)
        if config is None:
            raise draft.refused([*others, *data.problems])
        search = search_model(config, is_local=is_local(), runs_here=runs_here)
        if meanwhile and not (draft.problems or others or search.problems or data.problems):
            meanwhile(config)
        model = check_model(config, search, child)
        problems = [*others, *model.problems, *data.problems]
        if draft.problems or problems or model.facts is None or data.columns is None:
            raise draft.refused(problems)
        rows = selected_rows(data.inputs, config.input, config.limits, config.seed)
        checked = CheckedJob(config, config.prompt_template(), data.inputs, data.columns, rows, data.failed)
        mask = (model.facts.adapter_mask or "causal") if config.mask == "auto" else config.mask
        ready = ReadyJob(checked, model.facts, mask, fingerprint_fields(checked, model.facts, mask))
        spec = ready.render_spec(today())
        check_prompts(config, model.facts, spec, child)
        reasoning = check_reasoning(config, spec, child)
        return replace(ready, trial=try_rows(checked, spec, child), reasoning=reasoning)


def existing_manifest(job: ReadyJob) -> Manifest | None:
    """The plan in the output folder, if there is one. Raises ForeignOutput if it is another job's."""
    manifest = load_manifest(job.store)
    if manifest is not None:
        check_same_job(manifest, job.fields, job.config.output.path)
    return manifest


def today() -> str:
    """The date a new plan is frozen at."""
    return datetime.date.today().isoformat()
