"""A chat as it is handed to a template: the same keys and values that transformers would hand over.

What a template cannot take is adapted first, as vLLM does it: parts are joined for templates that want strings, a
`developer` becomes a `system` message, and arguments that are JSON text become mappings. Knows templates and messages;
no token, no border.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.chat_template import ChatTemplate
from segue.workers.prompts.conversation import PART_SEPARATOR, REASONING, Chat, Message
from segue.workers.prompts.disguise import Disguise
from segue.workers.prompts.private_use import PrivateUse

_ORDINARY = frozenset({"name", "tool_call_id", "tool_calls", *REASONING})  # templates may leave these out
_NOT_SHOWN = frozenset({"refusal", "annotations", "audio", "function_call"})  # of OpenAI's answers


@dataclass(frozen=True)
class Marks:
    """What is marked in a chat: the end of every content and of the name of every function that is called, and where
    parts begin. A mark is a number."""

    messages: tuple[Message, ...]
    blank: bool  # contents of white space are marked, too
    calls: bool
    by_part: bool = False

    def content(self, number: int) -> int:
        """The mark in this message's content; -1 if it has none."""
        message = self.messages[number]
        return number if message.parts and (self.blank or message.content.strip()) else -1

    def named(self, number: int) -> range:
        """The marks in the names of its calls."""
        first = len(self.messages) + sum(len(message.call_names) for message in self.messages[:number])
        return range(first, first + len(self.messages[number].call_names)) if self.calls else range(0)

    def part(self, number: int, place: int) -> int:
        """The mark before a part."""
        return self.first_part + sum(len(message.texts) for message in self.messages[:number]) + place

    @cached_property
    def first_part(self) -> int:
        return sum(1 + len(message.call_names) for message in self.messages)


class Handover:
    """Hands chats to one template."""

    def __init__(self, template: ChatTemplate, *, continues: bool) -> None:
        self._template = template
        self._continues = continues

    def adapted(self, chat: Chat) -> Chat:
        """The chat in a form that the template takes.

        Raises RowError: BAD_MESSAGES for what would be lost, TEMPLATE_ERROR for what the template cannot show.
        """
        if chat.tools and not self._template.knows_tools:
            raise _error("the chat template shows no tools")
        if taken := sorted(self._template.names & chat.kwargs.keys()):
            raise _bad(f"the arguments for the chat template must not have {', '.join(taken)}")
        if self._continues and (chat.messages[-1].role != "assistant" or not chat.messages[-1].parts):
            raise _bad("continue_final_message wants a last message of role assistant with a content")
        messages = (self._adapted(number, message) for number, message in enumerate(chat.messages))
        return replace(chat, messages=tuple(messages))

    def rendered(
        self, chat: Chat, private: PrivateUse, disguise: Disguise | None = None, marks: Marks | None = None
    ) -> str:
        """The rendered text, of a message to be continued up to its end. Raises RowError(TEMPLATE_ERROR)."""
        tag = f"{private.end} " if self._continues else ""
        messages = [self._message(number, message, disguise, marks) for number, message in enumerate(chat.messages)]
        if tag:
            _append(messages[-1], tag)
        hides_tools = disguise is not None and not chat.trusts_tools
        text = self._template.render(
            messages,
            add_generation_prompt=not self._continues,
            tools=disguise.value(chat.tools) if disguise and hides_tools else chat.tools,
            kwargs=disguise.values(chat.kwargs) if disguise else chat.kwargs,
        )
        return _cut(text, tag) if tag else text

    def _adapted(self, number: int, message: Message) -> Message:
        lost = [key for key in message.fields if key not in _ORDINARY and not self._template.reads(key)]
        if lost and not set(lost) <= _NOT_SHOWN:
            raise _bad(
                f"message {number} has {len(lost)} keys that the chat template does not read; they would be lost"
            )
        if message.fields.get("tool_calls") and not self._template.knows_calls:
            raise _error("the chat template shows no calls of tools")
        if message.role == "developer" and not self._template.takes_developer:
            message = replace(message, role="system")
        calls = message.fields.get("tool_calls")
        if calls and not self._template.takes_argument_text:
            message = replace(message, fields={**message.fields, "tool_calls": [_with_mapping(call) for call in calls]})
        return message

    def _message(self, number: int, message: Message, disguise: Disguise | None, marks: Marks | None) -> dict[str, Any]:
        said: dict[str, Any] = {"role": message.role}
        speaks = message.role == "assistant"
        if message.parts is not None:
            said["content"] = self._content(number, message, disguise, marks)
        fields = dict(message.fields) if disguise is None else disguise.values(message.fields, is_assistant=speaks)
        if disguise is not None and marks is not None and (places := marks.named(number)):
            fields = fields | {"tool_calls": _marked_calls(fields["tool_calls"], map(disguise.private.mark, places))}
        return said | fields

    def _content(self, number: int, message: Message, disguise: Disguise | None, marks: Marks | None) -> object:
        texts = list(message.texts)
        if disguise is not None and marks is not None:
            speaks = message.role == "assistant"
            texts = [disguise.text(part.text, is_assistant=speaks, author=part.author) for part in message.parts or ()]
            texts = _marked(texts, number, message, disguise.private, marks)
        if message.is_list and self._template.takes_lists(message.role):
            return [{"type": "text", "text": text} for text in texts]
        return PART_SEPARATOR.join(texts)


def _marked(texts: list[str], number: int, message: Message, private: PrivateUse, marks: Marks) -> list[str]:
    last = max((place for place, text in enumerate(texts) if text.strip()), default=0)
    first = next((place for place, text in enumerate(texts) if text.strip()), 0)
    mark = marks.content(number)
    if mark >= 0:
        length = len(texts[last].rstrip())
        texts[last] = texts[last][:length] + private.mark(mark) + texts[last][length:]
    if marks.by_part and message.is_bidirectional:
        for place, text in enumerate(message.texts):
            if place > first and text.strip():  # a blank part is not a segment: templates may trim it away
                texts[place] = private.mark(marks.part(number, place)) + texts[place]
    return texts


def _marked_calls(calls: Sequence[dict[str, Any]], marks: Iterator[str]) -> list[dict[str, Any]]:
    """The calls with a mark after each name; those without a name get none."""
    marked = []
    for call in calls:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            function = function | {"name": function["name"] + next(marks)}
            call = call | {"function": function} if "function" in call else function
        marked.append(call)
    return marked


def _with_mapping(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with its arguments as a mapping, if they are the JSON text of one."""
    function = call.get("function", call)
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(arguments, str):
        return dict(call)
    try:
        found = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return dict(call)
    if not isinstance(found, dict):
        return dict(call)
    changed = {**function, "arguments": found}
    return {**call, "function": changed} if "function" in call else changed


def _append(message: dict[str, Any], tag: str) -> None:
    if isinstance(message["content"], str):
        message["content"] += tag
    else:
        message["content"][-1]["text"] += tag


def _cut(text: str, tag: str) -> str:
    """The text before the tag. White space at the end of a message that the template trims goes with it, as in
    transformers."""
    place = text.rfind(tag.strip())
    if place < 0:
        raise _error("the chat template loses the end of the message to continue")
    return text[:place] if text.startswith(tag, place) else text[:place].rstrip()


def _error(message: str) -> RowError:
    return RowError(RowErrorCode.TEMPLATE_ERROR, message)


def _bad(message: str) -> RowError:
    return RowError(RowErrorCode.BAD_MESSAGES, message)


def marks_of(messages: Sequence[Message], *, by_part: bool) -> list[Marks]:
    """What may be marked, the preferred way first: a template may treat a content or a name with a mark otherwise."""
    ways = [Marks(tuple(messages), blank, calls, by_part) for calls in (True, False) for blank in (True, False)]
    has_calls = any(message.call_names for message in messages)
    has_blank = any(message.parts is not None and not message.content.strip() for message in messages)
    return [way for way in ways if (way.calls or has_calls) and (way.blank or has_blank)]
