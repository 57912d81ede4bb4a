"""A model's chat template, rendered as transformers renders it, on a fixed date.

Only this module knows transformers' Jinja environment. Does not know tokens, segments or rows.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.conversation import REASONING

RenderedMessage = Mapping[str, Any]  # as transformers takes it
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception"})
CALL = {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": {"key": "value"}}}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "x", "parameters": {
    "type": "object", "properties": {"key": {"type": "string", "description": "x"}}, "required": ["key"],
}}}  # fmt: skip
_A, _B = "\U000f0004", "\U000f0005"  # characters that no template looks for or writes


class ChatTemplate:
    """A compiled chat template. Raises ValueError if `source` is not valid Jinja.

    `date` is what the template's `strftime_now` returns: some templates print today's date, and the prompts of a plan
    must be the same on the day when it is resumed.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        kwargs: Mapping[str, Any],
        date: datetime.date,
    ) -> None:
        self.source = source
        self.special_tokens = frozenset(token for token in special_tokens.values() if isinstance(token, str))
        self.names = RESERVED | special_tokens.keys()  # that a row's arguments must not have
        self._variables = {"tools": None, "documents": None, **special_tokens, **kwargs}
        # All text that it may write without a row.
        self.constants = [source, json.dumps(self._variables, ensure_ascii=False, default=str)]
        self._compiled = _compile(source, date)
        self.takes_lists = cache(self._takes_lists)

    def render(
        self,
        messages: Sequence[RenderedMessage],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that transformers' `apply_chat_template` renders. Raises RowError(TEMPLATE_ERROR) if it raises."""
        variables = {**self._variables, **(kwargs or {}), "tools": list(tools) if tools else None}
        conversation = [_with_reasoning(message) for message in messages]
        try:
            return self._compiled.render(
                messages=conversation, add_generation_prompt=add_generation_prompt, **variables
            )
        except MemoryError:  # other rows may have used up the memory
            raise
        except Exception as error:  # a template is code: whatever it raises is the row's error, without its text
            message = f"the chat template raised {type(error).__name__} on roles {_roles(messages)}"
            raise RowError(RowErrorCode.TEMPLATE_ERROR, message) from None

    @property
    def knows_tools(self) -> bool:
        """Whether it may show tool definitions."""
        return "tools" in self.source

    @property
    def knows_calls(self) -> bool:
        """Whether it may show the calls of an assistant message."""
        return "tool_calls" in self.source

    def reads(self, field: str) -> bool:
        """Whether it may read this field of a message."""
        return field in self.source

    def _takes_lists(self, role: str) -> bool:
        """Whether it writes the texts of a list of content parts, so that a list can be handed to it.

        vLLM finds this out from the template's syntax. Asking the template itself sees more ways to write it.
        """
        parts = [{"type": "text", "text": _A}, {"type": "text", "text": _B}]
        before, after, rest = self._tried(role, parts).partition(_A)
        between, found, rest = rest.partition(_B)
        return bool(after and found) and not between.strip() and _A not in before + rest and _B not in rest

    @cached_property
    def takes_argument_text(self) -> bool:
        """Whether it writes arguments that are a JSON text as they are, and not as a JSON string of that text."""
        text = json.dumps({_A: _B}, ensure_ascii=False)
        call = {**CALL, "function": {**CALL["function"], "arguments": text}}
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            return text in self.render(messages, add_generation_prompt=False)
        except RowError:
            return False

    @cached_property
    def takes_developer(self) -> bool:
        """Whether it shows a message of the role `developer`, the newer name of `system`."""
        return _A in self._tried("developer", _A)

    def _tried(self, role: str, content: object) -> str:
        """The text of a short chat in which a message of this role has this content; "" if the template raises."""
        user, call = {"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}
        message = {"role": role, "content": content}
        tool = {**message, "tool_call_id": CALL["id"], "name": CALL["function"]["name"]}
        chats = {"user": [message], "assistant": [user, message, user], "tool": [user, call, tool]}
        try:
            return self.render(chats.get(role, [message, user]), add_generation_prompt=False)
        except RowError:
            return ""


def _with_reasoning(message: RenderedMessage) -> RenderedMessage:
    """Reasoning under each of the names that templates read it by, as transformers hands it over."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _compile(source: str, date: datetime.date) -> Any:
    # transformers caches compiled templates by source, and no function can be passed to it. Its uncached compiler
    # returns a template of our own, so that setting its clock changes no other template's.
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    try:
        compiled: Any = _cached_compile_jinja_template(source)
    except TemplateError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from None
    compiled.globals["strftime_now"] = datetime.datetime.combine(date, datetime.time()).strftime
    return compiled


def _roles(messages: Sequence[RenderedMessage]) -> str:
    shown = ", ".join(message["role"] for message in messages[:8])
    return shown if len(messages) <= 8 else f"{shown} and {len(messages) - 8} more"
