"""Everything that changes a job's results, under the names of the job file: what its output folder belongs to.

Parallelism, batch sizes, limits on errors and the plan's own cost are not in it. Knows a checked job and its model.
"""

from typing import Any

from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.ledger.manifest import code_version
from segue.pipeline.ledger.shards import PROTOCOL
from segue.pipeline.ready.checks import CheckedJob, input_identity
from segue.workers.models.facts import ModelFacts


def fingerprint_fields(checked: CheckedJob, facts: ModelFacts, mask: str) -> dict[str, Any]:
    """Values of JSON's kinds by name. `mask` is resolved: segment or causal."""
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
        "output.split_reasoning": config.output.split_reasoning,
        "output.max_rows_per_file": config.output.max_rows_per_file,
        "output.max_bytes_per_file": config.output.max_bytes_per_file,
    }


def _what_is_asked(config: JobConfig) -> dict[str, Any]:
    """The one of the two sections that the task has a use for."""
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
