"""A job file, with `--set` overrides, to a JobDraft: what is right in it and every mistake, each on one line.

Relative paths in `input.path`, `input.retry_of`, `output.path`, `model.source`, `model.adapter` and `content_file` are
relative to the job file's folder, also when they come from an override; absolute paths and URLs stay as they are. Knows
nothing of data, models or Ray: it opens the job file and the content files it names, nothing else.
"""

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel, ValidationError

from segue.pipeline.jobfile.mistakes import JobPath, Where, problems_of
from segue.pipeline.jobfile.schema import InputConfig, JobConfig, ModelConfig, OutputConfig, scheme_of
from segue.pipeline.jobfile.training import FinetuneConfig
from segue.pipeline.jobfile.yaml_text import MAX_YAML_BYTES, YamlDocument, key_of, read_yaml
from segue.pipeline.problems import JobRefused, Problem, shown
from segue.workers.prompts.template import PromptTemplate
from segue.workers.scoring.template import ScoringTemplate, Task

AnySection = TypeVar("AnySection", bound=BaseModel)
OVERRIDE = "--set"  # where a problem is that no line of the file has
ECHO = "echo"  # the model without weights, never a folder


@dataclass(frozen=True)
class JobDraft:
    """A job file as far as it could be understood; sections that are refused are None."""

    config: JobConfig | None  # None if any section is refused
    input: InputConfig | None
    prompt: PromptTemplate | None
    output: OutputConfig | None
    task: Task | None
    scoring: ScoringTemplate | None
    problems: tuple[Problem, ...]
    where: Where  # the place in the file that a key comes from

    def refused(self, others: Sequence[Problem] = ()) -> JobRefused:
        """For all that is wrong with the file, and `others`; problems without a place get the lines of their keys."""
        return JobRefused(map(self._placed, [*self.problems, *others]))

    def _placed(self, problem: Problem) -> Problem:
        return problem if problem.where else replace(problem, where=self.where(tuple(problem.key.split("."))))


def read_job(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), schema: type[JobConfig] = JobConfig
) -> JobDraft:
    """The job in the YAML file `path`, with overrides such as "sampling_params.max_tokens=64" on top.

    What is right comes beside what is wrong, so that the data can be checked as well. `schema` is the kind of job.
    Raises JobRefused only if the file cannot be read as a mapping at all.
    """
    file = Path(path)
    document = _document_of(file)
    values = document.value
    if not isinstance(values, dict):
        wanted = "a mapping of keys such as name: and model:"
        raise JobRefused(document.problems or [Problem("", shown(values), wanted, where=file.name)])
    overridden, problems = _override(values, overrides)
    folder = file.parent.absolute()

    def where(path: JobPath) -> str:
        return _where(path, document, overridden, file.name)

    return _draft(values, schema, folder, where, [*document.problems, *problems])


def is_training(path: str | os.PathLike[str]) -> bool:
    """Whether a job file has sections that only a training has. Raises JobRefused if it cannot be read."""
    values = _document_of(Path(path)).value
    keys = values.keys() if isinstance(values, dict) else set()
    return bool(keys & (FinetuneConfig.model_fields.keys() - JobConfig.model_fields.keys()))


def _document_of(file: Path) -> YamlDocument:
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise JobRefused([Problem("", error.strerror or str(error), "a readable job file", where=str(file))]) from None
    if len(raw) > MAX_YAML_BYTES:
        wanted = f"at most {MAX_YAML_BYTES:,} bytes; put long texts into a content_file"
        raise JobRefused([Problem("", "a larger file", wanted, where=file.name)])
    try:
        return read_yaml(raw.decode("utf-8-sig"), file.name)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problem = Problem("", "bytes that are not UTF-8", "a job file in UTF-8", where=f"{file.name}:{line}")
        raise JobRefused([problem]) from None


def _where(path: JobPath, document: YamlDocument, overridden: Collection[JobPath], name: str) -> str:
    """The override or the line that a problem at `path` comes from, else the file."""
    for end in range(len(path), 0, -1):
        if path[:end] in overridden:
            return OVERRIDE
        if path[:end] in document.lines:
            return f"{name}:{document.lines[path[:end]]}"
    # A section that only an override made has no line of its own.
    return OVERRIDE if path and any(made[: len(path)] == path for made in overridden) else name


def _override(values: dict[str, object], overrides: Sequence[str]) -> tuple[set[JobPath], list[Problem]]:
    """Put each "a.b=value" into `values`. The schema decides whether such a key exists."""
    overridden: set[JobPath] = set()
    problems: list[Problem] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(Problem("", shown(override), "key=value, such as seed=1", where=OVERRIDE))
            continue
        document = read_yaml(text, f"{OVERRIDE} {key}")
        problems += document.problems
        if not document.problems:
            try:
                overridden.add(_set(values, key, document.value))
            except ValueError as error:
                problems.append(Problem(key, str(error), "a key of the job file", where=OVERRIDE))
    return overridden, problems


def _set(values: dict[str, object], key: str, value: object) -> JobPath:
    """Set the value at a dotted key, making sections on the way. Raises ValueError if a part is no section."""
    *parents, last = key.split(".")
    node: object = values
    path: JobPath = ()
    for part in parents:
        step = _step(node, part, key_of(path))
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[step]  # type: ignore[index]
        path = (*path, step)
    step = _step(node, last, key_of(path))
    node[step] = value  # type: ignore[index]
    return (*path, step)


def _step(node: object, part: str, at: str) -> str | int:
    """The dict key or list position that `part` is in `node`."""
    if isinstance(node, dict):
        return part
    if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        return int(part)
    raise ValueError(f"no {part!r} below {at}, which is {shown(node)}")


def _draft(
    values: dict[str, object], schema: type[JobConfig], folder: Path, where: Where, problems: list[Problem]
) -> JobDraft:
    config: JobConfig | None = None
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        problems = problems + problems_of(error, values, schema, where)
    rows = config.input if config else _section(InputConfig, values.get("input"))
    output = config.output if config else _section(OutputConfig, values.get("output"))
    prompt = config.prompt if config else _section(PromptTemplate, values.get("prompt", {}))
    task = config.task if config else _task(values.get("task", schema.model_fields["task"].default))
    scoring = config.scoring if config else _section(ScoringTemplate, values.get("scoring", {}))
    rows = rows and _resolved_input(rows, folder)
    output = output and output.model_copy(update={"path": _data_path(output.path, folder)})
    try:
        prompt = prompt and prompt.resolve(folder)
    except (ValueError, OSError) as error:
        problems = [*problems, Problem("prompt", "", str(error), where=where(("prompt",)))]
        prompt = None
    if config is None or problems:
        return JobDraft(None, rows, prompt, output, task, scoring, tuple(problems), where)
    sections = {"input": rows, "output": output, "prompt": prompt, "model": _resolved_model(config.model, folder)}
    sections |= config.other_paths(partial(_data_path, folder=folder))
    return JobDraft(config.model_copy(update=sections), rows, prompt, output, task, scoring, (), where)


def _task(value: object) -> Task | None:
    return next((task for task in get_args(Task) if task == value), None)


def _section(section: type[AnySection], values: object) -> AnySection | None:
    """The section if it is right on its own."""
    try:
        return section.model_validate(values)
    except ValidationError:
        return None


def _data_path(path: str, folder: Path) -> str:
    if scheme_of(path) == "file":
        return path[len("file://") :]
    return path if scheme_of(path) else _local_path(path, folder)


def _local_path(path: str, folder: Path) -> str:
    path = os.path.expanduser(path)
    return path if os.path.isabs(path) else os.path.normpath(folder / path)


def _resolved_input(rows: InputConfig, folder: Path) -> InputConfig:
    paths = tuple(_data_path(path, folder) for path in rows.path)
    return rows.model_copy(update={"path": paths, "retry_of": rows.retry_of and _data_path(rows.retry_of, folder)})


def _resolved_model(model: ModelConfig, folder: Path) -> ModelConfig:
    """Local sources become absolute; a hub id looks like a relative path and stays, unless such a path exists."""
    places = {
        "source": _model_path(model.source, folder),
        "adapter": model.adapter and _model_path(model.adapter, folder),
    }
    return model.model_copy(update=places)


def _model_path(source: str, folder: Path) -> str:
    if re.split("[:?]", source)[0] == ECHO or scheme_of(source):
        return source if scheme_of(source) != "file" else _data_path(source, folder)
    local = _local_path(source, folder)
    return local if source.startswith((".", "~")) or os.path.exists(local) else source
