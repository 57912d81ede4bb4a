"""What one row says, before any template: messages, tools, and the checks that a row's text must pass.

A message is OpenAI's: a role, a content, and whatever else a template may read of it (`tool_calls`, `name`,
`reasoning_content`, ...) as plain JSON values. Knows shapes and sizes of text. Does not know templates, tokenizers or
where the row comes from.
"""

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.json_values import json_of, plain, strings_in

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)
MAX_MESSAGES = 1000
PART_SEPARATOR = "\n"  # as in vLLM, where a template takes strings only
REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers takes them for one another
_SAYS_SOMETHING = ("tool_calls", "function_call", *REASONING)  # so that an answer may have no content
# Of ShareGPT's form, `{from: human, value: ...}`, which data sets use; the calls and observations are LLaMA-Factory's.
_SENDERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system", "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """A text of a content."""

    text: str
    author: tuple[Span, ...] = ()  # what of it the job wrote, not the row

    @classmethod
    def of(cls, pieces: Iterable[tuple[str, bool]]) -> "Part":
        """A text of pieces, each with whether the job's author wrote it."""
        text, spans = "", []
        for piece, is_author in pieces:
            spans += [(len(text), len(text) + len(piece))] if is_author else []
            text += piece
        return cls(text, tuple(spans))


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: Role
    parts: tuple[Part, ...] | None  # None: it has no content, as an answer that only calls tools
    is_list: bool = False  # its content is a list of parts, not a text
    fields: Mapping[str, Any] = field(default_factory=dict)  # all else that it has, as JSON values

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(part.text for part in self.parts or ())

    @property
    def content(self) -> str:
        """Its parts joined by PART_SEPARATOR."""
        return PART_SEPARATOR.join(self.texts)

    @property
    def reasoning(self) -> tuple[str, ...]:
        return tuple(self.fields[name] for name in REASONING if name in self.fields)

    @property
    def is_bidirectional(self) -> bool:
        """Assistant text was generated causally and stays causal. All other roles are read at once."""
        return self.role != "assistant"

    @property
    def call_names(self) -> tuple[str, ...]:
        """The names of the functions that it calls."""
        calls = self.fields.get("tool_calls", ())
        functions = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
        names = [function.get("name") for function in functions if isinstance(function, Mapping)]
        return tuple(name for name in names if isinstance(name, str))


@dataclass(frozen=True, slots=True)
class Chat:
    """All that a chat template is told by a job and a row."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # the row's own arguments for the template
    trusts_tools: bool = False  # the job gave the tools, not the row

    @property
    def strings(self) -> Iterator[str]:
        """Every string in it, also keys."""
        for message in self.messages:
            yield from message.texts
            yield from strings_in(message.fields)
        yield from strings_in(self.tools)
        yield from strings_in(self.kwargs)

    @property
    def said(self) -> list[str]:
        """What its messages say: one of these must not be blank."""
        texts = [text for message in self.messages for text in (*message.texts, *message.reasoning)]
        return texts + [name for message in self.messages for name in message.call_names]


def parse_messages(value: object) -> tuple[Message, ...]:
    """A row's messages column, which may be JSON text, or a list of chat messages given to the engine.

    Raises RowError: NULL_PROMPT, BAD_MESSAGES, UNSUPPORTED_CONTENT.
    """
    if value is None:
        raise RowError(RowErrorCode.NULL_PROMPT, "the messages are null")
    if isinstance(value, str):
        value = json_of(value, "the messages")
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _bad(f"messages must be a list of {{role, content}}, got {type(value).__name__}")
    messages = tuple(value)
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise _bad(f"want 1 to {MAX_MESSAGES} messages, got {len(messages)}")
    return tuple(_parse_message(number, message) for number, message in enumerate(messages))


def parse_tools(value: object, what: str) -> tuple[Any, ...]:
    """Tool definitions: JSON text, or a list of mappings. None is no tools. Raises RowError(BAD_MESSAGES)."""
    if isinstance(value, str):
        value = json_of(value, what) if value.strip() else None
    if value is None:
        return ()
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        raise _bad(f"{what} must be a list of tools, got {type(value).__name__}")
    tools = tuple(plain(tool, what) for tool in value)
    if not all(isinstance(tool, dict) for tool in tools):
        raise _bad(f"{what} must be a list of mappings, one for each tool")
    return tools


def parse_kwargs(value: object, what: str) -> dict[str, Any]:
    """Arguments for a chat template: JSON text, or a mapping. None is no arguments. Raises RowError(BAD_MESSAGES)."""
    if isinstance(value, str):
        value = json_of(value, what) if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _bad(f"{what} must be a mapping of the chat template's arguments, got {type(value).__name__}")
    return {name: each for name, each in plain(value, what).items() if each is not None}


def column_text(row: Mapping[str, object], column: str) -> str:
    """A column's value as text. Raises RowError: NULL_PROMPT if null, BAD_MESSAGES if neither text nor a number."""
    value = row.get(column)
    if value is None:
        raise RowError(RowErrorCode.NULL_PROMPT, f"column {column!r} is null")
    if isinstance(value, str):
        return value
    if isinstance(value, bool | numbers.Real):
        return str(value)
    raise _bad(f"column {column!r} must be text, a number or a boolean, got {type(value).__name__}")


def check_texts(texts: Sequence[str], *, from_row: Sequence[str], max_bytes: int) -> None:
    """Refuse text that must not reach a template or a tokenizer.

    `texts` is all text of the prompt. `from_row` is what the row itself supplied; nothing if the prompt is constant.
    Raises RowError: PROMPT_TOO_LARGE, BAD_UNICODE, EMPTY_PROMPT.
    """
    num_chars = sum(map(len, texts))
    num_bytes = num_chars if num_chars > max_bytes else sum(map(_num_bytes, texts))
    if num_bytes > max_bytes:
        raise RowError(RowErrorCode.PROMPT_TOO_LARGE, too_large(num_bytes, max_bytes))
    if from_row and all(not text.strip() for text in from_row):
        raise RowError(RowErrorCode.EMPTY_PROMPT, "all text that the row supplies is empty or white space")


def too_large(num_bytes: int, max_bytes: int) -> str:
    """The message of PROMPT_TOO_LARGE."""
    return f"the prompt has {num_bytes:,} bytes or more, limits.max_prompt_bytes is {max_bytes:,}"


def _parse_message(number: int, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise _bad(f"message {number} must be {{role, content}}, got {type(message).__name__}")
    if _is_sharegpt(message):
        message = _as_openai(number, message)
    fields = {key: value for key, value in message.items() if value is not None}
    role: Any = fields.pop("role", None)
    content = fields.pop("content", None)
    if role not in ROLES:
        raise _bad(f"message {number} must have one of the roles {', '.join(ROLES)}")
    kept = _parse_fields(number, fields)
    if content is None and not (role == "assistant" and any(kept.get(name) for name in _SAYS_SOMETHING)):
        raise _bad(f"message {number} has no content")
    is_list = content is not None and not isinstance(content, str)
    return Message(role, None if content is None else _parse_content(number, content), is_list, kept)


def _parse_fields(number: int, fields: Mapping[Any, object]) -> dict[str, Any]:
    """What a message has beside role and content. Empty lists and mappings say nothing."""
    kept = {key: value for key, value in plain(fields, f"message {number}").items() if value not in ([], {})}
    calls = kept.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _bad(f"tool_calls of message {number} must be a list of mappings")
    for name in (*REASONING, "name", "tool_call_id"):
        if not isinstance(kept.get(name, ""), str):
            raise _bad(f"{name} of message {number} must be text, got {type(kept[name]).__name__}")
    return kept


def _parse_content(number: int, content: object) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (Part(content),)
    if isinstance(content, bytes | Mapping) or not isinstance(content, Iterable):
        raise _bad(f"content of message {number} must be text or a list of parts, got {type(content).__name__}")
    return tuple(_parse_part(number, part) for part in content)


def _parse_part(number: int, part: object) -> Part:
    if not isinstance(part, Mapping):
        raise _bad(f"a content part of message {number} must be {{type: text, text: ...}}, got {type(part).__name__}")
    fields = {key: value for key, value in part.items() if value is not None}
    if fields.pop("type", "text") != "text" or fields.keys() - {"text"}:
        raise RowError(RowErrorCode.UNSUPPORTED_CONTENT, f"message {number} has a content part that is not text")
    if not isinstance(fields.get("text"), str):
        raise _bad(f"a text part of message {number} has no text")
    return Part(fields["text"])


def _is_sharegpt(message: Mapping[Any, object]) -> bool:
    """Whether a message is in this form."""
    return message.get("role") is None and message.get("from") is not None and "value" in message


def _as_openai(number: int, message: Mapping[Any, object]) -> dict[Any, object]:
    """The message in OpenAI's form. Raises RowError(BAD_MESSAGES)."""
    sender, value = message["from"], message["value"]
    role = _SENDERS.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise _bad(f"message {number} must be from one of {', '.join(_SENDERS)}")
    others = {key: each for key, each in message.items() if key not in ("from", "value", "role")}
    if sender != "function_call":
        return {**others, "role": role, "content": value}
    return {**others, "role": role, "tool_calls": _calls(number, value)}


def _calls(number: int, value: object) -> list[dict[str, object]]:
    """The calls in the JSON text of a `function_call`: one `{name, arguments}`, or a list of them."""
    found = json_of(value, f"the calls of message {number}") if isinstance(value, str) else value
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise _bad(f"message {number} must be a function call, the JSON of {{name, arguments}}")
    return [{"type": "function", "function": dict(call)} for call in calls if isinstance(call, Mapping)]


def _num_bytes(text: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        message = f"a lone surrogate at character {error.start:,} cannot be encoded"
        raise RowError(RowErrorCode.BAD_UNICODE, message) from None


def _bad(message: str) -> RowError:
    return RowError(RowErrorCode.BAD_MESSAGES, message)
