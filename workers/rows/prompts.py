"""Prompts as a caller of the engine writes them, in the forms that vLLM takes, as one kind of data each.

Knows forms only: no tokenizer, no template, no model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from segue.attention.segments import Segment
from segue.workers.errors import RowError, RowErrorCode

_KEYS = ("prompt", "prompt_token_ids")

# Text, {"prompt": text}; token ids, {"prompt_token_ids": ids}; a chat; or segments of token ids.
Prompt = str | Mapping[str, Any] | Sequence[int] | Sequence[Mapping[str, Any]] | Sequence[Segment]


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """One prompt: exactly one of text, a chat, and segments. Beside segments, `text` is what they were made from."""

    text: str | None = None
    chat: Sequence[Any] | None = None
    segments: tuple[Segment, ...] | None = None


def prompts_of(given: Any) -> list[Any]:
    """The single prompts of what a caller gave, which may be one prompt or many.

    One: a text, a mapping, a list of token ids, of segments, or of mappings with a `role`. Any other list is many.
    """
    given = _listed(given)
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        return [given]
    items = list(given)
    return [items] if items and _is_one(items) else items


def chats_of(given: Any) -> list[Any]:
    """The same for chats alone: a list of messages is one."""
    items = list(given) if isinstance(given, Iterable) and not isinstance(given, str | Mapping) else [given]
    return [items] if items and isinstance(items[0], Mapping) else items


def read_prompt(given: Any) -> ReadPrompt:
    """Raises RowError(NULL_PROMPT, BAD_PROMPT). A chat's messages are not read here."""
    given = _listed(given)
    if given is None:
        raise RowError(RowErrorCode.NULL_PROMPT, "the prompt is None")
    if isinstance(given, str):
        return ReadPrompt(text=given)
    if isinstance(given, Mapping):
        return _of_mapping(given)
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise _bad(f"a {type(given).__name__}")
    items = list(given)
    if all(isinstance(item, Segment) for item in items):
        return ReadPrompt(segments=tuple(items))
    if all(map(_is_token, items)):
        return ReadPrompt(segments=_segments(items))
    if any(isinstance(item, Mapping) for item in items):
        return ReadPrompt(chat=items)
    raise _bad(f"a list of {' and '.join(sorted({type(item).__name__ for item in items}))}")


def _of_mapping(given: Mapping[str, Any]) -> ReadPrompt:
    values = {key: value for key, value in given.items() if value is not None}
    if not values or not values.keys() <= {*_KEYS}:
        raise _bad(f"a mapping of {len(values)} keys, wanted {' or '.join(_KEYS)} in it")
    text, ids = values.get("prompt"), _listed(values.get("prompt_token_ids"))
    if text is not None and not isinstance(text, str):
        raise _bad(f"a mapping whose prompt is a {type(text).__name__}, wanted text in it")
    if ids is None:
        return ReadPrompt(text=text)
    if isinstance(ids, str) or not isinstance(ids, Iterable) or not all(map(_is_token, ids := list(ids))):
        raise _bad("a mapping whose prompt_token_ids are no list of integers")
    return ReadPrompt(text=text, segments=_segments(ids))


def _segments(ids: Sequence[Any]) -> tuple[Segment, ...]:
    return (Segment(tuple(map(int, ids)), False),)


def _is_one(items: Sequence[Any]) -> bool:
    if isinstance(items[0], Mapping):
        return "role" in items[0]
    return all(isinstance(item, Segment) for item in items) or all(map(_is_token, items))


def _is_token(item: Any) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)


def _listed(given: Any) -> Any:
    """Arrays and tensors as lists."""
    return given.tolist() if hasattr(given, "tolist") else given


def _bad(found: str) -> RowError:
    wanted = "text, token ids, segments, a list of messages, or a mapping with prompt or prompt_token_ids"
    return RowError(RowErrorCode.BAD_PROMPT, f"the prompt is {found}; a prompt is {wanted}")
