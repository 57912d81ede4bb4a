"""The messages of a request, as OpenAI and vLLM have them, as a column of a dataset.

A content is always a list of text parts, as vLLM makes it: a text is a list of one. What is not text is refused by its
type. Knows the format; no model and no template.
"""

import json
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from segue.pipeline.problems import nearest
from segue.workers.prompts.conversation import ROLES

_TEXTS = ("text", "input_text", "output_text")
_CALL = pa.struct(
    [
        ("id", pa.string()),
        ("type", pa.string()),
        ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())])),
    ]
)
MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))),
        ("name", pa.string()),
        ("tool_call_id", pa.string()),
        ("tool_calls", pa.list_(_CALL)),
        ("reasoning_content", pa.string()),
    ]
)


def named(name: object) -> str:
    """A name that a request has made up, if it looks like one; else it may be any text."""
    is_name = isinstance(name, str) and len(name) <= 64 and name.replace("-", "_").replace(".", "_").isidentifier()
    return str(name) if is_name else "a name"


def _text_part(part: object) -> object:
    if isinstance(part, str):
        return {"text": part}
    if not isinstance(part, dict):
        return part
    kind = part.get("type", "text")
    if kind not in _TEXTS:
        raise ValueError(f"{named(kind)} parts are not supported, only text")
    return {key: value for key, value in part.items() if key != "type" and value is not None}


def _parts(content: object) -> object:
    return [content] if isinstance(content, str) else content


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _TextPart(_Strict):
    text: str


class _Function(_Strict):
    name: str
    arguments: Annotated[str, BeforeValidator(lambda value: json.dumps(value) if isinstance(value, dict) else value)]


class _ToolCall(_Strict):
    function: _Function
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None  # of a stream; it says nothing here


class Message(_Strict):
    """One message of a request."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Annotated[_TextPart, BeforeValidator(_text_part)]] | None, BeforeValidator(_parts)] = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[_ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's newer name of it
    # OpenAI's client writes these into the answers of earlier turns.
    refusal: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        says_something = self.role == "assistant" and (self.tool_calls or self._reasoning)
        if self.content is None and not says_something:
            raise ValueError("content: missing, wanted a text or a list of text parts")
        return self

    @property
    def _reasoning(self) -> str | None:
        return self.reasoning_content or self.reasoning

    def value(self) -> dict[str, Any]:
        """The message in the type MESSAGE."""
        parts = None if self.content is None else [{"type": "text", "text": part.text} for part in self.content]
        return {
            "role": self.role if self.role in ROLES else "system",  # developer is the newer name of the same role
            "content": parts,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": [call.model_dump(exclude={"index"}) for call in self.tool_calls or ()] or None,
            "reasoning_content": self._reasoning or None,
        }


def not_known(name: object, known: list[str]) -> str:
    """What is said of a name that nobody knows."""
    hint = nearest(str(name), known)
    return f"not known{f' ({hint})' if hint else ''}"
