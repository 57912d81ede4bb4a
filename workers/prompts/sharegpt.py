"""Messages in ShareGPT's form, `{from: human, value: ...}`, as OpenAI's `{role: user, content: ...}`.

The names are those that data sets in this form use; `function_call` and `observation` are LLaMA-Factory's. Knows the
form only.
"""

from collections.abc import Mapping
from typing import Any

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.json_values import json_of

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system", "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip


def is_sharegpt(message: Mapping[Any, object]) -> bool:
    """Whether a message is in this form."""
    return message.get("role") is None and message.get("from") is not None and "value" in message


def as_openai(number: int, message: Mapping[Any, object]) -> dict[Any, object]:
    """The message in OpenAI's form. Raises RowError(BAD_MESSAGES)."""
    sender, value = message["from"], message["value"]
    role = _ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise _bad(f"message {number} must be from one of {', '.join(_ROLES)}")
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


def _bad(message: str) -> RowError:
    return RowError(RowErrorCode.BAD_MESSAGES, message)
