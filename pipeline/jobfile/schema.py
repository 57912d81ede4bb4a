"""What a job file may say: its sections, types, ranges and defaults, as frozen data.

Knows nothing of YAML, of files or of Ray: whether a path exists or a column is there is for `pipeline/ready/checks.py`.
Names are vLLM's and Ray's where they have one. `JobConfig.model_json_schema()` is the file's JSON schema.
"""

import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from segue.pipeline.jobfile.filters import Filters
from segue.pipeline.problems import has_credentials
from segue.workers.prompts.template import PromptTemplate
from segue.workers.rows.params import SamplingParams
from segue.workers.scoring.template import RunTask, ScoringTemplate

DATA_SCHEMES = ("file", "s3")
MIB = 2**20
MIN_ROWS_FOR_ERROR_RATE = 1000  # a rate of fewer says little
_JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def scheme_of(path: str) -> str:
    """The scheme of a URL in lower case, "" for a plain path."""
    match = _SCHEME.match(path)
    return match[1].lower() if match else ""


def _check_name(name: str) -> str:
    if not _JOB_NAME.fullmatch(name) or ".." in name:
        raise PydanticCustomError(
            "job_name", "1 to 128 letters, digits, '.', '_' or '-', starting with a letter or digit, without '..'"
        )
    return name


def _check_location(path: str) -> str:
    """A place that can be named in errors and records: not empty, one line, no secret inside."""
    if has_credentials(path):
        raise PydanticCustomError(
            "credentials", "a URL without credentials; put them into the environment or the usual AWS files"
        )
    if not path.strip() or not path.isprintable():
        raise PydanticCustomError("location", "a path or URL that is not empty and has no control characters")
    return path


def _check_data_location(path: str) -> str:
    _check_location(path)
    scheme = scheme_of(path)
    if (scheme and scheme not in DATA_SCHEMES) or "::" in path:
        raise PydanticCustomError("scheme", "a local path, a file:/// URL or an s3:// URL")
    if scheme == "file" and not path[len("file://") :].startswith("/"):
        raise PydanticCustomError("file_url", "file:/// followed by an absolute path")
    return scheme + path[len(scheme) :]  # in lower case


def _tuple_of_one_or_many(value: object) -> object:
    """YAML has lists, not tuples, and a single path is a string."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _lists_to_tuples(section: object) -> object:
    return {key: _list_to_tuple(value) for key, value in section.items()} if isinstance(section, dict) else section


def _check_distinct(names: object) -> object:
    if isinstance(names, tuple) and len(set(names)) != len(names):
        raise PydanticCustomError("distinct", "each name once")
    return names


def _nonempty(paths: tuple[str, ...]) -> tuple[str, ...]:
    if not paths:
        raise PydanticCustomError("no_path", "at least one path")
    return paths


Location = Annotated[str, AfterValidator(_check_location)]
DataLocation = Annotated[str, AfterValidator(_check_data_location)]
_STRINGS = {"type": "array", "items": {"type": "string"}}
DataLocations = Annotated[
    tuple[DataLocation, ...],
    BeforeValidator(_tuple_of_one_or_many),
    AfterValidator(_nonempty),
    WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS | {"minItems": 1}]}),
]
ColumnChoice = Annotated[
    Literal["all"] | tuple[str, ...],
    BeforeValidator(_list_to_tuple),
    AfterValidator(_check_distinct),
    WithJsonSchema({"anyOf": [{"const": "all"}, _STRINGS | {"uniqueItems": True}]}),
]
PositiveInt = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of a job file: unknown keys, loose types and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which weights, and in which precision."""

    source: Location  # a folder, a hub id, s3://, a .gguf file, package://NAME/FILE, or echo
    # auto: bfloat16, or what the hardware has instead
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # weights of fewer bits: transformers' configuration with its quant_method, {quant_method: torchao, quant_type: ...}
    quantization: dict[str, JsonValue] | None = None
    adapter: Location | None = None  # a PEFT adapter's folder
    check_adapter: bool = True  # refuse a mask or template that the adapter says it was not trained with
    revision: str | None = None  # a hub id's branch, tag or commit


class InputColumns(Section):
    """Which column of the dataset plays a part that has another name in it."""

    prompt: str | None = None  # a text, the user's message
    messages: str | None = None  # a list of role and content, or of ShareGPT's from and value, or JSON text of it
    instruction: str | None = None  # of the formats alpaca and commonsense
    input: str | None = None  # of format alpaca
    choices: str | None = None  # a list of texts
    label: str | None = None  # the right choice
    continuation: str | None = None  # a text that is scored, or learned


class InputConfig(Section):
    """Which rows."""

    path: DataLocations  # files, folders or globs; relative paths are relative to the job file's folder
    columns: InputColumns = InputColumns()  # the short form for templates that name no column
    # only rows for which all of these hold, [[lang, "==", de], [score, ">", 0.5]]; or lists of such, of which one must
    filters: Filters | None = None
    # so many of the rows that are left, or such a part of them, by the job's seed
    sample: PositiveInt | Annotated[float, Field(gt=0, lt=1)] | None = None
    limit: Annotated[int, Field(ge=0)] | None = None  # the first rows of these in (src_path, src_row) order
    retry_of: DataLocation | None = None  # a finished output: only the rows that have an error in it


class PlanConfig(Section):
    """How rows are ordered."""

    window_rows: PositiveInt = 1_000_000  # rows ordered at once; only they share what they have in common


class OutputConfig(Section):
    """Where results go, and in what pieces."""

    path: DataLocation  # a folder; relative to the job file's folder
    columns: ColumnChoice = "all"  # input columns passed through
    # a column reasoning_text, and in generated_text only what follows it: by the markers of the chat template
    split_reasoning: bool = False
    max_rows_per_file: PositiveInt = 8192  # of a unit of work, which is one file
    max_bytes_per_file: PositiveInt = 64 * MIB  # of plan data a unit


class WorkersConfig(Section):
    """How many model processes, and what each may use."""

    min_size: PositiveInt = 1  # model processes, at least
    max_size: PositiveInt = 1  # and at most, as there is room
    num_gpus: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"  # a worker; auto: one if the cluster has any
    accelerator_type: Annotated[str, Field(min_length=1)] | None = None  # of its GPUs, as Ray calls it: H100, A100, L4
    tensor_parallel_size: PositiveInt = 1  # more is refused; num_gpus above 1 puts a model's layers on several GPUs
    units_in_flight: PositiveInt = 4  # units a worker holds at once
    max_num_seqs: PositiveInt | None = None  # rows a step
    max_num_batched_tokens: PositiveInt | None = None  # tokens a step
    kv_cache_memory_bytes: PositiveInt | None = None  # a worker; null: its share of 40% of what its node has free
    enable_prefix_caching: bool = True  # false computes each row for itself: to compare
    threads: PositiveInt | None = None  # CPU threads a worker
    step_timeout_s: Annotated[float, Field(gt=0)] = 600.0  # a worker whose step takes longer is killed
    # after a signal units in flight may go on for so long; what is not finished then is computed again
    drain_timeout_s: Annotated[float, Field(ge=0)] = 10.0

    @model_validator(mode="after")
    def _check_sizes(self) -> "WorkersConfig":
        if self.num_gpus != "auto" and self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise PydanticCustomError(
                "gpus", "num_gpus must be a whole number, or a part of one GPU, got {got}", {"got": self.num_gpus}
            )
        if self.tensor_parallel_size > 1:
            raise PydanticCustomError(
                "tensor_parallel",
                "tensor parallelism is not available, got tensor_parallel_size {got}: num_gpus above 1 puts a model's "
                "layers on several GPUs of one worker",
                {"got": self.tensor_parallel_size},
            )
        if self.max_size < self.min_size:
            raise PydanticCustomError(
                "sizes",
                "max_size must be at least min_size ({low}), got {high}",
                {"low": self.min_size, "high": self.max_size},
            )
        return self


class LimitsConfig(Section):
    """What a row, and a job, may cost before it is refused."""

    max_model_len: PositiveInt | None = None  # tokens of prompt and answer; null is the model's own
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = (
        0.05  # of the whole job's rows; more rows with an error end it, unless it has fewer than 1,000
    )
    max_prompt_bytes: PositiveInt = 4 * MIB  # of UTF-8, of one row
    # of one row, from the file to its tokens; what takes more is killed
    row_cpu_s: Annotated[float, Field(ge=1, le=86_400)] = 30.0
    # of the process that reads and renders, beside what it has loaded
    row_memory_bytes: Annotated[int, Field(ge=64 * MIB)] = 2048 * MIB


class JobConfig(Section):
    """A whole job file."""

    # letters, digits, '.', '_' and '-'; of a submission, and of metrics
    name: Annotated[str, AfterValidator(_check_name)]
    task: RunTask = "generate"  # what is done with a row: answer it, or score it
    model: ModelConfig  # which weights
    mask: Literal["auto", "segment", "causal"] = "auto"  # auto: the adapter's, else causal
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # of draws, and of which rows input.sample takes
    input: InputConfig  # which rows
    prompt: PromptTemplate = PromptTemplate()  # how a row becomes a prompt
    scoring: Annotated[ScoringTemplate, BeforeValidator(_lists_to_tuples)] = (
        ScoringTemplate()
    )  # what follows the prompt
    # how answers are drawn; a column sampling_params overrides it by row
    sampling_params: SamplingParams = SamplingParams()
    plan: PlanConfig = PlanConfig()  # how rows are ordered
    output: OutputConfig  # where results go
    workers: WorkersConfig = WorkersConfig()  # how many processes, and what each may use
    limits: LimitsConfig = LimitsConfig()  # what a row, and a job, may cost

    def other_paths(self, resolve: Callable[[str], str]) -> dict[str, Section]:
        """The sections, other than those all jobs have, in which paths are to be resolved, with these resolved."""
        return {}

    def prompt_template(self) -> PromptTemplate:
        """`prompt` with the names of `input.columns` put in."""
        return template_over(self.prompt, self.input.columns)

    def scoring_template(self) -> ScoringTemplate:
        """`scoring` with the names of `input.columns` put in."""
        return scoring_over(self.scoring, self.input.columns)


def template_over(prompt: PromptTemplate, columns: InputColumns) -> PromptTemplate:
    """The template reading the columns that `columns` names instead of those it reads by default."""
    changes: dict[str, object] = {}
    if columns.prompt is not None:
        changes["prompt_column"] = columns.prompt
    if columns.messages is not None:
        changes["messages_column"] = columns.messages
    preset = columns.model_dump(include={"instruction", "input"}, exclude_none=True)
    if preset:
        changes["columns"] = prompt.columns | preset
    return prompt.model_copy(update=changes)


def scoring_over(scoring: ScoringTemplate, columns: InputColumns) -> ScoringTemplate:
    """What is scored, read from the columns that `columns` names."""
    names = columns.model_dump(include={"choices", "label", "continuation"}, exclude_none=True)
    return scoring.model_copy(update={f"{part}_column": name for part, name in names.items()})
