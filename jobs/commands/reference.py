"""Pages that are made of the code: every key of a job file, and every error.

    python -m segue.jobs.commands.reference      # writes jobs/howto/reference.md and jobs/howto/errors.md

Knows the models of job files and the codes; writes Markdown.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from segue.jobs.commands.ending import EXIT_CODES
from segue.pipeline.jobfile.json_schema import job_schema, nested_models
from segue.pipeline.jobfile.schema import JobConfig
from segue.pipeline.jobfile.training import FinetuneConfig
from segue.workers.errors import RowErrorCode

FOLDER = Path(__file__).parents[1] / "howto"
_MADE = "Made of the code by `python -m segue.jobs.commands.reference`; a test compares."
_ABOUT_KEYS = (
    "`segue schema` and `segue schema --finetune` print the same as JSON schema, for editors.\n"
    "`--set section.key=value` sets any of them from the command line. Unknown keys are refused."
)
_ABOUT_ROWS = (
    "A row that cannot be answered costs itself: its columns are passed through, its `error` has a code and a message\n"
    "that never quotes the row. `segue errors OUT` lists them, `segue retry OUT --output OUT2` answers them with what\n"
    "`--set` changes."
)
_ABOUT_COMMANDS = (
    "stderr says what was found and what was wanted, a line for each problem; the exit code says what kind it is."
)
_BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}


def reference() -> str:
    """The keys of job files for `segue run` and `segue finetune`."""
    lines = ["# Job files, key by key", "", _MADE, "", _ABOUT_KEYS, ""]
    runs = nested_models(JobConfig)
    for model in runs:
        lines += _section(model, JobConfig, runs)
    lines += ["# Only for `segue finetune`", ""]
    trainings = nested_models(FinetuneConfig)
    for model in trainings:
        if model not in runs:
            lines += _section(model, FinetuneConfig, trainings)
    return "\n".join(lines)


def errors() -> str:
    """Why rows have no answer, and how commands end."""
    lines = ["# Errors", "", _MADE, "", "## Of a row", "", _ABOUT_ROWS, ""]
    lines += ["| code | the row has no answer because | what helps |", "|---|---|---|"]
    lines += [f"| `{code}` | {code.meaning} | {code.remedy} |" for code in RowErrorCode]
    lines += ["", "## Of a command", "", _ABOUT_COMMANDS, ""]
    lines += ["| exit code | what happened | what to do |", "|---|---|---|"]
    lines += [f"| {code} | {meaning} | {remedy} |" for code, (meaning, remedy) in EXIT_CODES.items()]
    return "\n".join([*lines, ""])


def _section(model: type[BaseModel], job: type[BaseModel], keys: Mapping[type[BaseModel], str]) -> Iterator[str]:
    """A model's keys; `keys` says where each model of the job file stands."""
    schema = job_schema(job)
    properties = (schema if model is job else schema["$defs"][model.__name__])["properties"]
    headings = {each.__name__: key for each, key in keys.items()}
    about = " ".join((model.__doc__ or "").split("\n\n")[0].split())
    yield from (f"## {f'`{keys[model]}`' if keys[model] else 'At the top'}", "", about, "")
    yield from ("| key | value | default | |", "|---|---|---|---|")
    for name, field in model.model_fields.items():
        key = field.alias or name
        value = properties[key]
        about = value.get("description", "").replace("|", "\\|")
        yield f"| `{key}` | {_kind(value, headings)} | {_default(field)} | {about} |"
    yield ""


def _kind(value: dict[str, Any], headings: Mapping[str, str]) -> str:
    """What may be written, from a JSON schema."""
    if "$ref" in value:
        heading = headings[value["$ref"].rpartition("/")[2]]
        return f"[keys](#{heading.lower().replace('.', '')})"
    for several in ("anyOf", "oneOf"):
        if several in value:
            return " or ".join(dict.fromkeys(_kind(each, headings) for each in value[several]))
    if "enum" in value or "const" in value:
        return " or ".join(f"`{each}`" for each in value.get("enum", [value.get("const")]))
    kind = str(value.get("type", "anything"))
    if kind == "array":
        items = value.get("items") or next(iter(value.get("prefixItems", [])), {})
        return f"list of {_kind(items, headings)}"
    bounds = [text.format(f"{value[name]:,}") for name, text in _BOUNDS.items() if name in value]
    return " ".join([{"object": "mapping", "boolean": "true or false"}.get(kind, kind), ", ".join(bounds)]).strip()


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        return ""
    return f"`{json.dumps(field.default, ensure_ascii=False)}`"


def main() -> None:
    (FOLDER / "reference.md").write_text(reference(), encoding="utf-8")
    (FOLDER / "errors.md").write_text(errors(), encoding="utf-8")


if __name__ == "__main__":
    main()
