"""The JSON schema of a job file, in which each key is described by the comment that stands beside it in the code.

Knows models and their source; nothing of what a job means.
"""

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from segue.pipeline.jobfile.mistakes import models_in


def job_schema(model: type[BaseModel]) -> dict[str, Any]:
    """`model.model_json_schema()` with descriptions."""
    schema = model.model_json_schema()
    for each in nested_models(model):
        place = schema if each is model else schema["$defs"][each.__name__]
        for name, text in comments_of(each).items():
            field = each.model_fields[name]
            place["properties"][field.alias or name]["description"] = text
    return schema


def nested_models(model: type[BaseModel]) -> dict[type[BaseModel], str]:
    """The model and those that its fields hold, each once, and the key under which it comes up first."""
    found = {model: ""}
    waiting = [model]
    while waiting:
        each = waiting.pop(0)
        for name, field in each.model_fields.items():
            for inner in models_in(field.annotation):
                if inner not in found:
                    found[inner] = f"{found[each]}.{field.alias or name}".lstrip(".")
                    waiting.append(inner)
    return found


def comments_of(model: type[BaseModel]) -> dict[str, str]:
    """By field, the comment in its lines, else the one on the lines just above it."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if issubclass(each, BaseModel) and each is not BaseModel:
            found.update(_comments_in(inspect.getsource(each)))
    return {name: text for name, text in found.items() if name in model.model_fields}


def _comments_in(source: str) -> Iterator[tuple[str, str]]:
    source = textwrap.dedent(source)
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith(("# fmt:", "# pyright:", "# type:"))
    }
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    for node in body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        beside = [
            comments[line] for line in range(node.lineno, (node.end_lineno or node.lineno) + 1) if line in comments
        ]
        above = []
        line = node.lineno - 1
        while line in comments and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, comments[line])
            line -= 1
        if beside or above:
            yield node.target.id, " ".join(beside or above)
