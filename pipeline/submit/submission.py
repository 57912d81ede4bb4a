"""A job as a cluster gets it: one job file, with the content of its prompt files and with absolute paths. On request
this installation's code comes with it.

Knows job files; nothing of clusters, planning or running.
"""

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import segue
from segue.pipeline.jobfile.read import is_training, read_job
from segue.pipeline.jobfile.schema import JobConfig, scheme_of
from segue.pipeline.jobfile.training import FinetuneConfig
from segue.pipeline.jobfile.yaml_text import MAX_YAML_BYTES, as_yaml, read_yaml
from segue.pipeline.ledger.manifest import code_version
from segue.pipeline.problems import JobRefused, Problem, first_and_last_line, has_credentials, shown

JOB_FILE = "job.json"
DIGEST_DIGITS = 8
SHIPPED_SUFFIXES = (".py", ".cpp", ".h", ".j2")
_SECRET = re.compile(r"(?i)secret|token|passw|credential|private|access_key|api_?key")


@dataclass(frozen=True, slots=True)
class SubmittedJob:
    """A job file as a cluster gets it."""

    name: str
    output: str
    command: str  # of segue: run or finetune
    content: bytes  # the job file, JSON
    local_paths: tuple[str, ...] = ()  # every node must have these paths

    @property
    def submission_id(self) -> str:
        """The id of the job's first attempt. Equal jobs have equal ids."""
        return f"segue-{self.name}-{hashlib.sha256(self.content).hexdigest()[:DIGEST_DIGITS]}"

    @property
    def metadata(self) -> dict[str, str]:
        """What everybody may see who can look at the queue."""
        return {"segue_job": self.name, "segue_output": self.output, "segue_version": code_version()}


def read_submitted(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> SubmittedJob:
    """Read a job file for `segue run` or `segue finetune`. Data and model are not looked for: the cluster may reach
    them though this machine does not.

    Raises JobRefused with every problem of the file.
    """
    trains = is_training(path)
    draft = read_job(path, overrides, FinetuneConfig if trains else JobConfig)
    if draft.config is None:
        raise draft.refused()
    config = draft.config
    content = as_yaml(config.model_dump(mode="json", exclude_unset=True)).encode("utf-8")
    if len(content) > MAX_YAML_BYTES:
        got = f"{len(content):,} bytes with its content files"
        raise JobRefused([Problem("", got, f"at most {MAX_YAML_BYTES:,}", where=str(path))])
    places = (*config.input.path, config.output.path, config.model.source, config.model.adapter or "")
    local = tuple(place for place in places if os.path.isabs(place) and not scheme_of(place))
    return SubmittedJob(config.name, config.output.path, "finetune" if trains else "run", content, local)


def read_runtime_env(path: str | None) -> dict[str, Any]:
    """A Ray runtime environment from a YAML file. Raises JobRefused if it has secrets, which Ray shows to everybody, or
    a working directory, which is needed for the job file."""
    if path is None:
        return {}
    try:
        document = read_yaml(Path(path).read_text(encoding="utf-8"), Path(path).name)
    except (OSError, UnicodeDecodeError) as error:
        raise JobRefused([Problem("", first_and_last_line(str(error)), "a readable YAML file", where=path)]) from None
    env = document.value
    if not isinstance(env, dict):
        wrong = Problem("", shown(env), "a mapping such as pip: or py_modules:", where=path)
        raise JobRefused([*document.problems, wrong])
    problems = [*document.problems, *_env_problems(env, path)]
    if problems:
        raise JobRefused(problems)
    return env


def _env_problems(env: dict[str, Any], path: str) -> Iterator[Problem]:
    if "working_dir" in env:
        yield Problem("working_dir", "one", "none: it holds the job file, and py_modules is for code")
    variables = env.get("env_vars", {})
    if not isinstance(variables, dict):
        yield Problem("env_vars", shown(variables), "a mapping of names to texts", where=path)
        variables = {}
    if has_credentials(json.dumps(env, default=str)):
        yield Problem("", "a URL with credentials", "none: Ray shows it to all who see its dashboard", where=path)
    for name in variables:
        if _SECRET.search(str(name)):
            hint = "Ray shows them to all who see its dashboard: give nodes a role or a mounted file"
            yield Problem("env_vars", repr(name), "no secrets", hint, where=path)


def copied_package(target: Path) -> str:
    """Copy the installed code to `target / "segue"`: modules, C++ sources, the report's template. Returns its path.

    Examples, benchmarks' results and caches are left out.
    """
    source = Path(segue.__file__).parent
    for name in sorted(glob.glob("**/*", root_dir=source, recursive=True)):  # follows the links of a checkout
        file = source / name
        if file.suffix in SHIPPED_SUFFIXES and not name.startswith(("jobs/examples/", "jobs/howto/")):
            copy = target / "segue" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    return str(target / "segue")
