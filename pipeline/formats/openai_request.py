"""One request of a batch file in OpenAI's format: what it asks for, in Segue's terms, or what is wrong with it.

Requests are private, so messages never quote them. Knows the format; no file, no model.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENDPOINTS = (CHAT, COMPLETIONS)
# Parameters that change no answer here.
_IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "stream_options", "safety_identifier", "prompt_cache_key", "model"}
)
# Parameters that would change the answer and are not supported. Errors name them; unknown names are the row's own text.
_UNSUPPORTED = frozenset(
    {"tools", "tool_choice", "functions", "function_call", "logprobs", "top_logprobs", "logit_bias",
     "best_of", "echo", "suffix", "modalities", "audio", "prediction", "reasoning_effort", "web_search_options",
     "parallel_tool_calls", "verbosity"}
)  # fmt: skip
# Values with which they would change nothing.
_SAYS_NOTHING = {
    "tool_choice": ("none", "auto"), "best_of": (1,), "modalities": (["text"],),
    "parallel_tool_calls": (True, False), "top_logprobs": (0,), "logprobs": (False,),
}  # fmt: skip
# OpenAI's defaults for parameters that a request leaves out; Segue's own differ.
DEFAULTS = {"temperature": 1.0, "top_p": 1.0}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part]
    # OpenAI's client writes these into the answers of earlier turns.
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: list[None] | None = None

    def value(self) -> dict[str, Any]:
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        role = "system" if self.role == "developer" else self.role  # the newer name of the same role
        return {"role": role, "content": [{"type": "text", "text": part} for part in parts]}


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    name: str
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None  # here a schema is always strict


class _ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "_ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, and is needed there")
        return self

    def form(self) -> dict[str, Any] | None:
        """The format in Segue's terms, None for plain text."""
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema else None
        return {"json": schema or {"type": "object"}}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    messages: Annotated[list[_Message], Field(min_length=1)] | None = None
    prompt: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: _ResponseFormat | None = None
    stream: Literal[False] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, value: object) -> object:
        """Without nulls, which the client writes for defaults, and without parameters that change nothing."""
        if not isinstance(value, dict):
            return value
        kept = {key: each for key, each in value.items() if key not in _IGNORED and each is not None}
        asked = {key for key, each in kept.items() if each not in _SAYS_NOTHING.get(key, (False, [], {}))}
        if named := sorted(_UNSUPPORTED & asked):
            raise ValueError(f"{', '.join(named)}: not supported")
        return {key: each for key, each in kept.items() if key not in _UNSUPPORTED}

    def params(self) -> dict[str, Any]:
        """The sampling parameters under Segue's names, with OpenAI's defaults."""
        names = ("temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.stop:
            given["stop"] = self.stop
        if (limit := self.max_completion_tokens or self.max_tokens) is not None:
            given["max_tokens"] = limit
        if self.response_format is not None and (form := self.response_format.form()):
            given["structured_outputs"] = form
        return DEFAULTS | given


class RequestLine(BaseModel):
    model_config = ConfigDict(strict=True)
    custom_id: Annotated[str, Field(min_length=1)]
    method: Literal["POST"] = "POST"
    url: str
    body: dict[str, Any]


class BadRequest(ValueError):
    """A line that cannot be answered; the message does not quote it."""


def parse_line(raw: bytes) -> RequestLine:
    """The request in a line of the file. Raises BadRequest."""
    try:
        return RequestLine.model_validate_json(raw)
    except ValidationError as error:
        raise BadRequest(_message_of(error)) from None


def asked_by(line: RequestLine, endpoint: str) -> dict[str, Any]:
    """The request's messages or prompt, and its sampling parameters as JSON. Raises BadRequest."""
    if line.url != endpoint:
        raise BadRequest(f"url: wanted {endpoint}, as in the first line of the file")
    try:
        body = _Body.model_validate(line.body)
    except ValidationError as error:
        raise BadRequest(_message_of(error)) from None
    params = json.dumps(body.params())
    if endpoint == CHAT:
        if body.messages is None:
            raise BadRequest("body.messages: missing")
        return {"messages": [message.value() for message in body.messages], "sampling_params": params}
    if body.prompt is None:
        raise BadRequest("body.prompt: missing, or not one text")
    return {"prompt": body.prompt, "sampling_params": params}


def _message_of(error: ValidationError) -> str:
    """The first thing that is wrong, without any text of the row."""
    first = error.errors(include_input=False, include_url=False)[0]
    if first["type"] == "extra_forbidden":
        return "a parameter that is not known"
    known = {*RequestLine.model_fields, *_Body.model_fields, *_Message.model_fields, *_Part.model_fields,
             *_ResponseFormat.model_fields, *_Schema.model_fields, "schema"}  # fmt: skip
    place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in known)
    if first["type"] == "json_invalid":
        return "the line is not JSON in UTF-8"  # or has half a surrogate pair
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
