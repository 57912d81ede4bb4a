"""What one row says, before any template: messages made of text parts, and the checks that a row's text must pass.

Knows shapes and sizes of text. Does not know templates, tokenizers or where the row comes from.
"""

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from segue.workers.errors import RowError, RowErrorCode

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)
MAX_MESSAGES = 1000
PART_SEPARATOR = "\n"  # as in vLLM, where a template takes strings only


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; its content is its parts joined by PART_SEPARATOR."""

    role: Role
    parts: tuple[str, ...]

    @property
    def content(self) -> str:
        return PART_SEPARATOR.join(self.parts)

    @property
    def is_bidirectional(self) -> bool:
        """Assistant text was generated causally and stays causal. All other roles are read at once."""
        return self.role != "assistant"


def parse_messages(value: object) -> tuple[Message, ...]:
    """A row's messages column, or a list of chat messages given to the engine.

    Raises RowError: NULL_PROMPT, BAD_MESSAGES, UNSUPPORTED_CONTENT.
    """
    if value is None:
        raise RowError(RowErrorCode.NULL_PROMPT, "the messages are null")
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _bad(f"messages must be a list of {{role, content}}, got {type(value).__name__}")
    messages = tuple(value)
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise _bad(f"want 1 to {MAX_MESSAGES} messages, got {len(messages)}")
    return tuple(_parse_message(number, message) for number, message in enumerate(messages))


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
    fields = {key: value for key, value in message.items() if value is not None}
    role, content = fields.pop("role", None), fields.pop("content", None)
    if role not in ROLES:
        raise _bad(f"message {number} must have one of the roles {', '.join(ROLES)}")
    if fields:
        raise _bad(f"message {number} has {len(fields)} keys beside role and content; they would be lost")
    if content is None:
        raise _bad(f"message {number} has no content")
    return Message(role, _parse_content(number, content))


def _parse_content(number: int, content: object) -> tuple[str, ...]:
    if isinstance(content, str):
        return (content,)
    if isinstance(content, bytes | Mapping) or not isinstance(content, Iterable):
        raise _bad(f"content of message {number} must be text or a list of parts, got {type(content).__name__}")
    return tuple(_parse_part(number, part) for part in content)


def _parse_part(number: int, part: object) -> str:
    if not isinstance(part, Mapping):
        raise _bad(f"a content part of message {number} must be {{type: text, text: ...}}, got {type(part).__name__}")
    fields = {key: value for key, value in part.items() if value is not None}
    if fields.pop("type", "text") != "text" or fields.keys() - {"text"}:
        raise RowError(RowErrorCode.UNSUPPORTED_CONTENT, f"message {number} has a content part that is not text")
    if not isinstance(fields.get("text"), str):
        raise _bad(f"a text part of message {number} has no text")
    return fields["text"]


def _num_bytes(text: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        message = f"a lone surrogate at character {error.start:,} cannot be encoded"
        raise RowError(RowErrorCode.BAD_UNICODE, message) from None


def _bad(message: str) -> RowError:
    return RowError(RowErrorCode.BAD_MESSAGES, message)
