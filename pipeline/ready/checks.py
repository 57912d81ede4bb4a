"""Everything a job is refused for before any work: its input, its columns, its output folder, its options.

Reads footers and looks at folders; loads no model, starts no Ray. Problems found elsewhere, such as the model's, are
put beside its own, so that a person sees all of them at once.
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from fsspec.utils import glob_translate

from segue.pipeline.dataset.columns import JobColumns, check_columns, columns_read
from segue.pipeline.dataset.files import InputFile, RowNumbers, cut_rows, discover
from segue.pipeline.dataset.listing import glob_root, has_magic, is_local
from segue.pipeline.dataset.selection import check_filters, common_rows, selected_rows
from segue.pipeline.jobfile.read import JobDraft, read_job
from segue.pipeline.jobfile.schema import InputConfig, JobConfig, scheme_of, scoring_over, template_over
from segue.pipeline.ledger.failed_rows import FailedRows, failed_rows
from segue.pipeline.ledger.manifest import ForeignOutput
from segue.pipeline.problems import JobRefused, Problem, nearest, shown
from segue.pipeline.storage.store import OutputStorageError, open_store
from segue.workers.models.echo import is_echo
from segue.workers.prompts.template import PromptTemplate
from segue.workers.rows.forms import problem_of
from segue.workers.scoring.template import ScoringTemplate


@dataclass(frozen=True)
class CheckedJob:
    """A job that may start."""

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
        # The limit of a sample was one of rows that this job, which takes no sample, does not count.
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
        """How many parts the rows are planned in, one after the other; one if there are no rows."""
        return max(1, -(-self.num_rows // self.config.plan.window_rows))

    def window(self, number: int) -> tuple[RowNumbers, ...]:
        """`rows`, of the window with this number."""
        size = self.config.plan.window_rows
        return cut_rows(self.rows, number * size, (number + 1) * size)


def check_job(config: JobConfig, *, has_gpu: bool = False, others: Sequence[Problem] = ()) -> CheckedJob:
    """The job with its inputs and columns. `has_gpu`: whether a worker with `num_gpus: auto` will get a GPU.

    Raises JobRefused with `others`, which the caller found, and every problem found here.
    """
    draft = JobDraft(config, config.input, config.prompt, config.output, config.task, config.scoring, ())
    return check_draft(draft, has_gpu=has_gpu, others=others)


def check_job_file(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, has_gpu: bool = False) -> CheckedJob:
    """`check_job` for a job file: mistakes of the file and of the data at once."""
    return check_draft(read_job(path, overrides), has_gpu=has_gpu)


def check_draft(draft: JobDraft, *, has_gpu: bool = False, others: Sequence[Problem] = ()) -> CheckedJob:
    """`check_job` for a job file as read."""
    select, problems = look_over(draft, has_gpu=has_gpu)
    if select is None or others:
        raise refused(draft, [*others, *problems])
    return select()


def look_over(draft: JobDraft, *, has_gpu: bool) -> tuple[Callable[[], CheckedJob] | None, list[Problem]]:
    """What makes the job, reading what its filters need, or what is wrong with it beside `draft.problems`: sections
    that are right are looked at even if others are wrong."""
    problems: list[Problem] = []
    inputs: tuple[InputFile, ...] = ()
    if draft.config is not None:
        problems += [*_check_dtype(draft.config, has_gpu), *_check_task(draft.config), *_check_form(draft.config)]
    if draft.input is not None:
        inputs, found = _check_input(draft.input)
        problems += found
    columns, found = _check_columns(draft, inputs)
    problems += found
    if draft.input is not None:
        problems += check_filters(draft.input.filters, inputs)
    failed, found = _check_retry(draft.input, inputs)
    problems += found
    if draft.output is not None:
        problems += check_output(draft.output.path, draft.input.path if draft.input else (), inputs)
    if draft.problems or problems or draft.config is None or columns is None:
        return None, problems
    return partial(_selected, draft.config, inputs, columns, failed), []


def _selected(
    config: JobConfig, inputs: tuple[InputFile, ...], columns: JobColumns, failed: FailedRows | None
) -> CheckedJob:
    selected = selected_rows(inputs, config.input, config.limits, config.seed)
    return CheckedJob(config, config.prompt_template(), inputs, columns, selected, failed)


def refused(draft: JobDraft, problems: Sequence[Problem]) -> JobRefused:
    """For all that is wrong with the file and these problems, with the lines of their keys."""
    return JobRefused(_placed(problem, draft) for problem in [*draft.problems, *problems])


def input_identity(inputs: Sequence[InputFile]) -> str:
    """One digest for all files: there may be thousands."""
    total = hashlib.sha256()
    for file in inputs:
        total.update(repr(sorted(file.identity().items())).encode())
    return f"{len(inputs)} files, sha256 {total.hexdigest()[:16]}"


def _placed(problem: Problem, draft: JobDraft) -> Problem:
    """The problem with the line of its key, if it does not have a place already."""
    return problem if problem.where else replace(problem, where=draft.where(tuple(problem.key.split("."))))


def _check_dtype(config: JobConfig, has_gpu: bool) -> list[Problem]:
    gpus = config.workers.num_gpus
    if config.model.dtype != "float16" or (has_gpu if gpus == "auto" else gpus > 0):
        return []
    return [Problem("model.dtype", "'float16' without a GPU", "auto, bfloat16 or float32", "fp16 is slow on CPUs")]


def _check_task(config: JobConfig) -> list[Problem]:
    """Sections that the task has no use for, and a format that it cannot have."""
    foreign = [f"scoring.{name}" for name in config.scoring.foreign_keys(config.task)]
    if config.task != "generate" and "sampling_params" in config.model_fields_set:
        foreign.append("sampling_params")
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


def _check_input(config: InputConfig) -> tuple[tuple[InputFile, ...], list[Problem]]:
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


def check_output(output: str, input_paths: Sequence[str], inputs: Sequence[InputFile]) -> list[Problem]:
    """Whether results can go into the folder `output`, and no later run would read them as input."""
    scheme = scheme_of(output)
    if scheme == "s3":
        return _check_bucket(output) or _check_remote_overlap(output, input_paths, inputs)
    if scheme:
        return [Problem("output.path", shown(output), "a local folder, or s3://BUCKET/PREFIX")]
    return _check_folder(output) or _check_overlap(output, input_paths, inputs)


def _check_bucket(output: str) -> list[Problem]:
    """Whether the place can be listed. Writes nothing."""
    try:
        open_store(output).names()
    except OutputStorageError as error:
        wanted = "a bucket that can be listed and written to with the credentials at hand"
        return [Problem("output.path", str(error), wanted)]
    return []


def _check_remote_overlap(output: str, input_paths: Sequence[str], inputs: Sequence[InputFile]) -> list[Problem]:
    """The same for URLs, which have no links."""
    folder = output.rstrip("/") + "/"
    for path in input_paths:
        is_inside = folder.startswith(path.rstrip("/") + "/")
        if is_inside or (has_magic(path) and re.match(glob_translate(path), f"{folder}part-000000-0.parquet")):
            got = f"{shown(output)}, where input.path {shown(path)} would read the results"
            return [Problem("output.path", got, "a prefix outside the input")]
    for file in inputs:
        if file.path.startswith(folder):
            got = f"{shown(output)}, which holds the input file {shown(file.path)}"
            return [Problem("output.path", got, "a prefix without input files")]
    return []


def _check_folder(output: str) -> list[Problem]:
    """A folder that is there and writable, or that can be made."""
    above = output
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        return [Problem("output.path", f"{shown(above)}, which is a file", "a folder, existing or new")]
    # The effective user is the one who will write.
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return [Problem("output.path", f"{shown(above)}, which is not writable", "a folder that can be written to")]
    return []


def _check_overlap(output: str, input_paths: Sequence[str], inputs: Sequence[InputFile]) -> list[Problem]:
    real = os.path.realpath(output)
    problems: list[Problem] = []
    for path in filter(is_local, input_paths):
        if _reads(os.path.abspath(path), real):
            got = f"{shown(output)}, where input.path {shown(path)} would read the results"
            problems.append(Problem("output.path", got, "a folder outside the input"))
    for file in inputs:
        if is_local(file.path) and os.path.realpath(file.path).startswith(real.rstrip("/") + "/"):
            got = f"{shown(output)}, which holds the input file {shown(file.path)}"
            return problems or [Problem("output.path", got, "a folder without input files")]
    return problems


def _reads(path: str, output: str) -> bool:
    """Whether an input folder or glob takes in files of the (real) folder `output`."""
    if os.path.isdir(path):
        return output == os.path.realpath(path) or output.startswith(os.path.realpath(path).rstrip("/") + "/")
    if os.path.lexists(path) or not has_magic(path):
        return False
    root = glob_root(path)
    relative = os.path.relpath(output, os.path.realpath(root))
    if relative.startswith(".."):
        return False
    shard = os.path.normpath(os.path.join(root, relative, "part-000000-0.parquet"))
    return re.match(glob_translate(path), shard) is not None
