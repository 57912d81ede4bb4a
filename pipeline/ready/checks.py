"""What a job's data is checked for before any work: its input, columns, options and output folder.

Reads footers and lists folders; loads no model, starts no Ray. Sections of the job file that are right are checked even
if others are wrong, so that a person sees all problems at once.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from segue.pipeline.dataset.columns import JobColumns, check_columns, columns_read
from segue.pipeline.dataset.files import InputFile, RowNumbers, cut_rows, discover
from segue.pipeline.dataset.selection import check_filters, common_rows
from segue.pipeline.jobfile.read import JobDraft
from segue.pipeline.jobfile.schema import InputConfig, JobConfig, scoring_over, template_over
from segue.pipeline.ledger.failed_rows import FailedRows, failed_rows
from segue.pipeline.ledger.manifest import ForeignOutput
from segue.pipeline.problems import JobRefused, Problem, nearest, shown
from segue.pipeline.ready.output import check_output
from segue.pipeline.storage.store import OutputStorageError
from segue.workers.models.echo import is_echo
from segue.workers.prompts.template import PromptTemplate
from segue.workers.rows.forms import problem_of
from segue.workers.scoring.template import ScoringTemplate


@dataclass(frozen=True)
class CheckedData:
    """What was found of a job's data, and what is wrong with it beside the job file itself."""

    inputs: tuple[InputFile, ...]  # in the order of src_path
    columns: JobColumns | None  # None if there is a problem with them
    failed: FailedRows | None  # the only rows to be read, if input.retry_of names an output
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class CheckedJob:
    """A job whose rows are known."""

    config: JobConfig
    template: PromptTemplate  # `config.prompt` with the names of `config.input.columns` in it
    inputs: tuple[InputFile, ...]  # in the order of src_path
    columns: JobColumns
    selected: tuple[RowNumbers, ...]  # of each input the rows that filters and sample take
    failed: FailedRows | None = None  # the only rows to be read, if input.retry_of names an output

    @cached_property
    def rows(self) -> tuple[RowNumbers, ...]:
        """Of each input the numbers of the rows that are read."""
        if self.failed is None:
            return cut_rows(self.selected, 0, self.config.input.limit)
        # A limit with a sample counted rows of that sample. This job takes no sample, so it cannot count them again.
        limit = self.config.input.limit if self.config.input.sample is None else None
        limited = cut_rows(self.selected, 0, limit)
        failed = [self.failed.rows.get(file.src_path, range(0)) for file in self.inputs]
        return tuple(common_rows(some, own) for some, own in zip(failed, limited, strict=True))

    @property
    def num_rows(self) -> int:
        """Of all that is read."""
        return sum(map(len, self.rows))

    @property
    def num_windows(self) -> int:
        """How many windows the rows are planned in, one after the other; one if there are no rows."""
        return max(1, -(-self.num_rows // self.config.plan.window_rows))

    def window(self, number: int) -> tuple[RowNumbers, ...]:
        """`rows`, of the window with this number."""
        size = self.config.plan.window_rows
        return cut_rows(self.rows, number * size, (number + 1) * size)


def check_data(draft: JobDraft, *, has_gpu: bool) -> CheckedData:
    """Look at the data of a job file. `has_gpu`: whether a worker with `num_gpus: auto` will get a GPU."""
    inputs, of_input = _check_input(draft.input)
    columns, of_columns = _check_columns(draft, inputs)
    failed, of_retry = _check_retry(draft.input, inputs)
    problems = [*_check_options(draft.config, has_gpu), *of_input, *of_columns]
    problems += check_filters(draft.input.filters, inputs) if draft.input else []
    problems += of_retry
    if draft.output is not None:
        problems += check_output(draft.output.path, draft.input.path if draft.input else (), inputs)
    return CheckedData(inputs, columns, failed, tuple(problems))


def input_identity(inputs: Sequence[InputFile]) -> str:
    """One digest for all files: there may be thousands."""
    total = hashlib.sha256()
    for file in inputs:
        total.update(repr(sorted(file.identity().items())).encode())
    return f"{len(inputs)} files, sha256 {total.hexdigest()[:16]}"


def _check_options(config: JobConfig | None, has_gpu: bool) -> list[Problem]:
    if config is None:
        return []
    return [*_check_dtype(config, has_gpu), *_check_task(config), *_check_form(config)]


def _check_dtype(config: JobConfig, has_gpu: bool) -> list[Problem]:
    gpus = config.workers.num_gpus
    if config.model.dtype != "float16" or (has_gpu if gpus == "auto" else gpus > 0):
        return []
    return [Problem("model.dtype", "'float16' without a GPU", "auto, bfloat16 or float32", "fp16 is slow on CPUs")]


def _check_task(config: JobConfig) -> list[Problem]:
    """Sections that mean nothing to the task, and a format that it cannot have."""
    foreign = [f"scoring.{name}" for name in config.scoring.foreign_keys(config.task)]
    if config.task != "generate" and "sampling_params" in config.model_fields_set:
        foreign.append("sampling_params")
    if config.task != "generate" and config.output.split_reasoning:
        foreign.append("output.split_reasoning")
    wanted = f"it left out: it means nothing to task {config.task}"
    problems = [Problem(key, "a value", wanted) for key in foreign]
    if config.task == "finetune" and config.input.retry_of is not None:
        problems.append(Problem("input.retry_of", "a value", "it left out: a training has no failed rows"))
    if config.task == "perplexity" and config.prompt.format != "text":
        problems.append(Problem("prompt.format", shown(config.prompt.format), "text, for task perplexity"))
    return problems


def _check_form(config: JobConfig) -> list[Problem]:
    """A form of answers that can be enforced, here and by this model."""
    outputs = config.sampling_params.structured_outputs
    if outputs is None:
        return []
    key = "sampling_params.structured_outputs"
    if is_echo(config.model.source):
        return [Problem(key, "a form of answers", "it left out: an echo has none")]
    problem = problem_of(outputs)
    return [Problem(f"{key}.{outputs.kind}", problem, "a form that can be enforced as a whole")] if problem else []


def _check_input(config: InputConfig | None) -> tuple[tuple[InputFile, ...], list[Problem]]:
    if config is None:
        return (), []
    try:
        return discover(config.path), []
    except JobRefused as refused:
        return (), list(refused.problems)


def _check_retry(config: InputConfig | None, inputs: Sequence[InputFile]) -> tuple[FailedRows | None, list[Problem]]:
    """The rows to be tried again, which must be those of the same files."""
    if config is None or config.retry_of is None or not inputs:
        return None, []
    try:
        failed = failed_rows(config.retry_of)
    except (ForeignOutput, OutputStorageError) as error:
        return None, [Problem("input.retry_of", str(error), "a complete output of segue run")]
    if failed.input_files != input_identity(inputs):
        wanted = f"the files that {shown(config.retry_of)} was made of ({failed.input_files})"
        return None, [Problem("input.path", input_identity(inputs), wanted)]
    return failed, []


def _check_columns(draft: JobDraft, inputs: Sequence[InputFile]) -> tuple[JobColumns | None, list[Problem]]:
    """Columns in every file, and `input.columns` only for what the job reads."""
    if draft.input is None or draft.prompt is None or draft.output is None or draft.task is None or not inputs:
        return None, []
    template = template_over(draft.prompt, draft.input.columns)
    scoring = scoring_over(draft.scoring or ScoringTemplate(), draft.input.columns)
    columns, problems = check_columns(inputs, template, draft.output.columns, task=draft.task, scoring=scoring)
    names = {name for file in inputs for name in file.schema.names}
    read = columns_read(template, draft.task, scoring, names)
    for part, column in draft.input.columns.model_dump(exclude_none=True).items():
        if column not in read:
            wanted = f"a column that the job reads ({', '.join(sorted(read)) or 'it reads none'})"
            problems.append(Problem(f"input.columns.{part}", shown(column), wanted, nearest(column, names)))
    return (None if problems else columns), problems
