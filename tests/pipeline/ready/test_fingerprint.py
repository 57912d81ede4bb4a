"""The fingerprint is whole: what changes results is in it by name, what is not in it changes none."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from echo_jobs import write_input, write_job
from pydantic import BaseModel
from ready_jobs import ready_job

from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.ledger.failed_rows import FailedRows
from segue.pipeline.ledger.manifest import ForeignOutput, check_same_fields
from segue.pipeline.ready import fingerprint
from segue.pipeline.ready.fingerprint import fingerprint_fields
from segue.pipeline.ready.job import ReadyJob

# A key of the job file, another value than it has in the test's job, and the field of the fingerprint that it changes.
CHANGES: list[tuple[str, Any, str]] = [
    ("mask", "segment", "mask"),
    ("seed", 1, "seed"),
    ("model.quantization", {"quant_method": "torchao"}, "model.quantization"),
    ("input.columns.prompt", "kind", "prompt"),
    ("input.columns.messages", "kind", "prompt"),
    ("input.columns.instruction", "kind", "prompt"),
    ("input.columns.input", "kind", "prompt"),
    ("input.columns.choices", "kind", "scoring"),
    ("input.columns.label", "kind", "scoring"),
    ("input.columns.continuation", "kind", "scoring"),
    ("input.filters", [["id", "==", 1]], "input.filters"),
    ("input.sample", 3, "input.sample"),
    ("input.limit", 5, "input.limit"),
    ("prompt.format", "text", "prompt"),
    ("prompt.segment_by", "part", "prompt"),
    ("prompt.messages", [{"role": "user", "content": "{prompt}"}], "prompt"),
    ("prompt.messages_column", "kind", "prompt"),
    ("prompt.prompt_column", "kind", "prompt"),
    ("prompt.chat_template", "{{ messages[0]['content'] }}", "prompt"),
    ("prompt.chat_template_kwargs", {"enable_thinking": False}, "prompt"),
    ("prompt.chat_template_kwargs_column", "kind", "prompt"),
    ("prompt.tools", [{"type": "function", "function": {"name": "f"}}], "prompt"),
    ("prompt.tools_column", "kind", "prompt"),
    ("prompt.continue_final_message", True, "prompt"),
    ("scoring.choices", ["yes", "no"], "scoring"),
    ("scoring.choices_column", "kind", "scoring"),
    ("scoring.label_column", "kind", "scoring"),
    ("scoring.target_delimiter", "\n", "scoring"),
    ("scoring.continuation", "{kind}", "scoring"),
    ("scoring.continuation_column", "kind", "scoring"),
    ("sampling_params.n", 2, "sampling_params"),
    ("sampling_params.temperature", 0.5, "sampling_params"),
    ("sampling_params.top_p", 0.5, "sampling_params"),
    ("sampling_params.top_k", 7, "sampling_params"),
    ("sampling_params.min_p", 0.5, "sampling_params"),
    ("sampling_params.max_tokens", 17, "sampling_params"),
    ("sampling_params.min_tokens", 1, "sampling_params"),
    ("sampling_params.seed", 1, "sampling_params"),
    ("sampling_params.stop", ["x"], "sampling_params"),
    ("sampling_params.stop_token_ids", [5], "sampling_params"),
    ("sampling_params.include_stop_str_in_output", True, "sampling_params"),
    ("sampling_params.ignore_eos", True, "sampling_params"),
    ("sampling_params.logprobs", 1, "sampling_params"),
    ("sampling_params.repetition_penalty", 1.5, "sampling_params"),
    ("sampling_params.presence_penalty", 0.5, "sampling_params"),
    ("sampling_params.frequency_penalty", 0.5, "sampling_params"),
    ("sampling_params.logit_bias", {"5": 1.5}, "sampling_params"),
    ("sampling_params.allowed_token_ids", [5], "sampling_params"),
    ("sampling_params.bad_words", ["x"], "sampling_params"),
    ("sampling_params.truncate_prompt_tokens", 5, "sampling_params"),
    ("sampling_params.skip_special_tokens", False, "sampling_params"),
    ("sampling_params.structured_outputs", {"regex": "a+"}, "sampling_params"),
    ("output.split_reasoning", True, "output.split_reasoning"),
    ("plan.window_rows", 7, "plan.window_rows"),
    ("output.max_rows_per_file", 7, "output.max_rows_per_file"),
    ("output.max_bytes_per_file", 7, "output.max_bytes_per_file"),
    ("limits.max_model_len", 7, "limits.max_model_len"),
    ("limits.max_prompt_bytes", 7, "limits.max_prompt_bytes"),
]
# Keys that change a field only together with others or with what they name: each has a test below.
CHANGES_BELOW = {
    "task", "prompt.text", "prompt.columns", "prompt.trusted_columns", "model.source", "model.revision",
    "model.adapter", "model.dtype", "input.path", "input.retry_of", "output.columns",
}  # fmt: skip
# Keys that change no answer, with another value than the test's job has.
WITHOUT_EFFECT: dict[str, Any] = {
    "name": "other",
    "model.check_adapter": False,
    "output.path": "/elsewhere",
    "workers.min_size": 2,
    "workers.max_size": 5,
    "workers.num_gpus": 0,
    "workers.accelerator_type": "H100",
    "workers.tensor_parallel_size": 1,  # others are refused
    "workers.units_in_flight": 1,
    "workers.max_num_seqs": 3,
    "workers.max_num_batched_tokens": 300,
    "workers.kv_cache_memory_bytes": 2**30,
    "workers.enable_prefix_caching": False,
    "workers.threads": 3,
    "workers.step_timeout_s": 5.0,
    "workers.drain_timeout_s": 60.0,
    "limits.max_error_rate": 1.0,
    "limits.row_cpu_s": 5.0,
    "limits.row_memory_bytes": 2**30,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> ReadyJob:
    folder = write_input(tmp_path_factory.mktemp("fingerprint"))
    return ready_job(write_job(folder, workers={"max_size": 4}))


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a job file; lists and mappings of the user's are one key."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def changed(job: ReadyJob, **values: Any) -> dict[str, Any]:
    """The fingerprint's fields of the job with other values of its file, by dotted key."""
    sections = json.loads(job.config.model_dump_json(exclude_unset=True))
    for key, value in values.items():
        *parents, last = key.split(".")
        section = sections
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    config = JobConfig.model_validate(sections)
    checked = replace(job.checked, config=config, template=config.prompt_template())
    mask = "causal" if config.mask == "auto" else config.mask
    return fingerprint_fields(checked, job.facts, mask)


def refused_for(there: dict[str, Any], here: dict[str, Any]) -> set[str]:
    """The names that the refusal of the folder says."""
    with pytest.raises(ForeignOutput) as refused:
        check_same_fields(json.loads(json.dumps(there)), here, "out")
    return set(re.findall(r"^  ([\w.]+): there ", str(refused.value), re.MULTILINE))


def task_of(key: str) -> dict[str, Any]:
    is_scoring = key.startswith("scoring.") or key in {
        f"input.columns.{p}" for p in ("choices", "label", "continuation")
    }
    return {"task": "choose"} if is_scoring else {}


@pytest.mark.parametrize(("key", "value", "name"), CHANGES, ids=[key for key, *_ in CHANGES])
def test_other_value_of_a_key_is_refused_by_the_name_of_its_field(base, key, value, name):
    task = task_of(key)
    assert refused_for(changed(base, **task), changed(base, **task, **{key: value})) == {name}


@pytest.mark.parametrize(("key", "value"), WITHOUT_EFFECT.items(), ids=WITHOUT_EFFECT)
def test_key_that_changes_no_answer_is_not_in_the_fingerprint(base, key, value):
    assert changed(base, **{key: value}) == base.fields


def test_every_key_of_a_job_file_is_in_the_fingerprint_or_changes_no_answer():
    keys = [key for key, *_ in CHANGES] + [*CHANGES_BELOW, *WITHOUT_EFFECT]
    assert sorted(keys) == sorted(keys_of(JobConfig))


def test_other_task_is_refused_with_the_sections_of_both(base):
    assert refused_for(base.fields, changed(base, task="choose")) == {"task", "sampling_params", "scoring"}
    assert refused_for(changed(base, task="choose"), changed(base, task="loglikelihood")) == {"task"}


def test_parts_of_a_prompt_that_one_format_has_are_refused(base):
    text = {"prompt.format": "text"}
    assert refused_for(changed(base, **text), changed(base, **text, **{"prompt.text": "{kind}"})) == {"prompt"}
    trusted = {"prompt.trusted_columns": ["prompt"]}
    assert refused_for(changed(base, **text), changed(base, **text, **trusted)) == {"prompt"}
    alpaca = {"prompt.format": "alpaca"}
    columns = {"prompt.columns": {"input": "kind"}}
    assert refused_for(changed(base, **alpaca), changed(base, **alpaca, **columns)) == {"prompt"}
    choose = {"task": "choose"}
    assert refused_for(changed(base, **choose), changed(base, **choose, **text)) == {"prompt", "scoring"}


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"identity": "another"}, "model"),
        ({"adapter_identity": "an adapter"}, "model.adapter"),
        ({"dtype": "bfloat16"}, "model.dtype"),
    ],
)
def test_other_model_is_refused_by_what_its_files_say(base, facts, name):
    other = fingerprint_fields(base.checked, replace(base.facts, **facts), base.mask)
    assert refused_for(base.fields, other) == {name}


def test_other_files_columns_and_failed_rows_are_refused(base):
    def with_(**changes: Any) -> dict[str, Any]:
        return fingerprint_fields(replace(base.checked, **changes), base.facts, base.mask)

    assert refused_for(base.fields, with_(inputs=base.checked.inputs[:1])) == {"input.files"}
    columns = replace(base.checked.columns, passed=base.checked.columns.passed[::-1])
    assert refused_for(base.fields, with_(columns=columns)) == {"output.columns"}
    failed = FailedRows("out", "f", "i", {"a.parquet": np.array([1, 2])})
    assert refused_for(base.fields, with_(failed=failed)) == {"input.retry_of"}
    others = replace(failed, rows={"a.parquet": np.array([1, 3])})
    assert refused_for(with_(failed=failed), with_(failed=others)) == {"input.retry_of"}
    assert refused_for(with_(failed=failed), with_(failed=replace(failed, fingerprint="g"))) == {"input.retry_of"}


@pytest.mark.parametrize(
    ("part", "value", "name"), [("PROTOCOL", 99, "protocol"), ("code_version", lambda: "99.9", "code")]
)
def test_other_code_is_refused(base, monkeypatch, part, value, name):
    monkeypatch.setattr(fingerprint, part, value)
    assert refused_for(base.fields, changed(base)) == {name}


def test_every_field_of_the_fingerprint_has_its_test(base):
    """A new field is to be changed by one of the tests above."""
    everything = changed(base, **{"input.filters": [["id", "==", 1]], "input.sample": 3}).keys()
    everything |= changed(base, task="choose").keys() | {"input.retry_of"}
    elsewhere = {"task", "model", "model.adapter", "model.dtype", "input.files", "input.retry_of", "output.columns"}
    assert everything == {name for *_, name in CHANGES} | elsewhere | {"protocol", "code"}


def test_ready_job_has_the_fields_of_its_own_data_and_model(base):
    assert base.fields == changed(base)
    assert base.fields["input.files"].startswith("2 files, sha256 ")
    assert (base.fields["model"], base.fields["model.dtype"]) == ("echo", "float32")
