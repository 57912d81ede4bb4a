"""What a job's model is checked for before any work: that it is there, loads, fits, and renders the job's prompts.

What may run a stranger's code, a configuration or a chat template, runs in the checking child. Imports neither torch
nor transformers.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.problems import JobRefused, Problem
from segue.pipeline.processes.limited import ChildDied, LimitedProcess
from segue.pipeline.prompts.check import adapter_record, config_facts, reasoning_markers
from segue.pipeline.prompts.render import RenderSpec
from segue.pipeline.ready.child import CHECK_SECONDS, found_in_child
from segue.pipeline.storage.models import local_source
from segue.workers.devices.gpus import num_gpus_here
from segue.workers.devices.memory import free_memory_bytes
from segue.workers.errors import ModelRefused
from segue.workers.models.adapter_record import AdapterRecord
from segue.workers.models.facts import ConfigFacts, FoundModel, ModelFacts, find_model, inspect_model
from segue.workers.prompts.reasoning import ReasoningMarkers

IDENTITY_DIGITS = 16  # of a model, in an adapter's record
GIB = 2**30


@dataclass(frozen=True)
class ModelSearch:
    """A model's files, and what is wrong before any of them is loaded."""

    found: FoundModel | None  # None if there is no such model
    free_bytes: int | None  # of this machine's memory; None if the workers run elsewhere
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class CheckedModel:
    """A model as its configuration says, and all that is wrong with it."""

    facts: ModelFacts | None  # None if it cannot be used
    problems: tuple[Problem, ...]


def search_model(config: JobConfig, *, is_local: bool, runs_here: bool) -> ModelSearch:
    """Find the model and the GPUs. `is_local`: Ray has this machine alone; `runs_here`: the workers will run on it."""
    found, problems = _find(config)
    problems += _check_gpus(config) if is_local else []
    free_bytes = free_memory_bytes() if runs_here else None  # before anything else is started here
    return ModelSearch(found, free_bytes, tuple(problems))


def check_model(config: JobConfig, search: ModelSearch, child: LimitedProcess) -> CheckedModel:
    """Look at the model that was found: its configuration and tokenizer in the child, its size here."""
    if search.found is None:
        return CheckedModel(None, search.problems)
    facts, problems = _look_at(config, search.found, child)
    problems += search.problems
    if facts is not None and search.free_bytes is not None:
        problems += _check_fits(config, facts, search.free_bytes)
    return CheckedModel(facts, tuple(problems))


def check_prompts(config: JobConfig, facts: ModelFacts, spec: RenderSpec, child: LimitedProcess) -> None:
    """Render a message with the model's tokenizer, and compare the prompts with those that the adapter was trained on.

    Raises JobRefused if they cannot be rendered, or if the adapter says that it was trained on others or under another
    mask.
    """
    own = _record_of(config, facts, spec, child)
    record = facts.adapter_record
    differing = record.differences(own) if record and config.model.check_adapter else []
    if differing:
        wanted = "what the adapter was trained with (its segue.json)"
        hint = "change the job, or set model.check_adapter: false to run it all the same"
        raise JobRefused([Problem("model.adapter", each, wanted, hint) for each in differing])


def check_reasoning(config: JobConfig, spec: RenderSpec, child: LimitedProcess) -> ReasoningMarkers | None:
    """What parts reasoning from answers, if the job wants them parted. Raises JobRefused if the template knows none."""
    if not config.output.split_reasoning:
        return None
    found = found_in_child(child, reasoning_markers, spec)
    if found is None:
        wanted = "a chat template that shows reasoning, as <think> ... </think>"
        raise JobRefused([Problem("output.split_reasoning", "a prompt without reasoning", wanted)])
    return found


def _find(config: JobConfig) -> tuple[FoundModel | None, list[Problem]]:
    model = config.model
    try:
        source, adapter = local_source(model.source), model.adapter and local_source(model.adapter, "model.adapter")
        return find_model(source, adapter=adapter, revision=model.revision), []
    except ModelRefused as error:
        return None, [Problem("model", "", str(error))]


def _record_of(config: JobConfig, facts: ModelFacts, spec: RenderSpec, child: LimitedProcess) -> AdapterRecord:
    """What an adapter trained with the job's prompts would say of them. Raises JobRefused."""
    memory = config.limits.row_memory_bytes
    try:
        return found_in_child(child, adapter_record, spec, facts.identity[:IDENTITY_DIGITS])
    except (ValueError, OSError) as error:
        raise JobRefused([Problem("prompt", "", str(error))]) from error
    except ChildDied as died:
        got = {
            "time": f"a chat template that takes longer than {CHECK_SECONDS:g} s for one message",
            "memory": f"a chat template that takes more than limits.row_memory_bytes, {memory:,}, for one message",
            "crash": "a tokenizer or chat template that ends its process",
        }[died.death]
        raise JobRefused([Problem("prompt", got, "one that renders")]) from None


def _look_at(config: JobConfig, found: FoundModel, child: LimitedProcess) -> tuple[ModelFacts | None, list[Problem]]:
    model = config.model
    look = functools.partial(_config_facts, child)
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
    return facts, _check_length(config, facts)


def _config_facts(child: LimitedProcess, directory: Path, **wanted: Any) -> ConfigFacts:
    return found_in_child(child, config_facts, directory, wanted)


def _check_length(config: JobConfig, facts: ModelFacts) -> list[Problem]:
    wanted = config.limits.max_model_len
    if wanted is None or wanted <= facts.max_model_len:
        return []
    return [Problem("limits.max_model_len", str(wanted), f"at most the model's own {facts.max_model_len}")]


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
