"""A model's chat template, rendered as transformers renders it, on a fixed date.

Only this module knows transformers' Jinja environment. Does not know tokens, segments or rows.
"""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from segue.workers.errors import RowError, RowErrorCode


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
        self._variables = {"tools": None, "documents": None, **special_tokens, **kwargs}
        self._compiled = _compile(source, date)

    def render(self, messages: Sequence[tuple[str, str]], *, add_generation_prompt: bool) -> str:
        """The rendered text of (role, content) pairs. Raises RowError(TEMPLATE_ERROR) if the template raises."""
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._compiled.render(
                messages=conversation, add_generation_prompt=add_generation_prompt, **self._variables
            )
        except MemoryError:  # other rows may have used up the memory
            raise
        except Exception as error:  # a template is code: whatever it raises is the row's error, without its text
            message = f"the chat template raised {type(error).__name__} on roles {_roles(messages)}"
            raise RowError(RowErrorCode.TEMPLATE_ERROR, message) from None


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


def _roles(messages: Sequence[tuple[str, str]]) -> str:
    shown = ", ".join(role for role, _ in messages[:8])
    return shown if len(messages) <= 8 else f"{shown} and {len(messages) - 8} more"
