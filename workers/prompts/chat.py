"""A conversation as pieces of text with borders between its segments, whatever the model's chat template does to it.

A private mark after each content shows where the template put it. Without the marks the rendering must be the real one.
Control tokens in the row's own text are hidden from the template and stay text. Knows templates and messages. Does not
know columns, presets or token ids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.chat_template import ChatTemplate
from segue.workers.prompts.conversation import PART_SEPARATOR, Message, Role
from segue.workers.prompts.private_use import PrivateUse
from segue.workers.prompts.scaffold import Scaffold, Scaffolds, common_length
from segue.workers.prompts.tokenizer import Piece, RunTokenizer, control_ids


@dataclass(frozen=True, slots=True)
class Border:
    """A segment begins at a character offset and ends at the next border."""

    offset: int
    bidirectional: bool


@dataclass(frozen=True, slots=True)
class SegmentedText:
    """A prompt before tokenisation: pieces of text, and borders in the joined text. The first border is at 0."""

    pieces: tuple[Piece, ...]
    borders: tuple[Border, ...]


@dataclass(frozen=True, slots=True)
class _Located:
    """A rendering and where its messages and parts end in it."""

    text: str  # control tokens in it are still hidden
    ends: tuple[tuple[int, int], ...]  # (message, offset after its last character that is not white space)
    part_starts: tuple[int, ...]


class ChatRenderer:
    """Renders conversations with one template. Raises ValueError if the template cannot show a user's message."""

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: RunTokenizer,
        *,
        bos: str,
        segment_by: Literal["message", "part"] = "message",
        continue_final_message: bool = False,
    ) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._by_part = segment_by == "part"
        self._continues = continue_final_message
        self._scaffolds = Scaffolds(template, tokenizer, bos)

    def check_roles(self, roles: Sequence[Role]) -> None:
        """Raises RowError(TEMPLATE_ERROR) if the template cannot render messages of these roles, each of them once."""
        generates = not self._continues
        self._real_text([Message(role, ("x",)) for role in roles], add_generation_prompt=generates)
        self._scaffolds.of(tuple(roles), (True,) * len(roles), add_generation_prompt=generates)

    def answer_end_id(self) -> int | None:
        """The control token that the template writes after an answer; None if it writes none."""
        answer = "\U000f0003"  # a character that no template looks for or writes
        text = self._real_text([Message("user", ("x",)), Message("assistant", (answer,))], add_generation_prompt=False)
        pieces = self._tokenizer.split(text.rpartition(answer)[2])
        return next((piece.control_id for piece in pieces if piece.control_id is not None), None)

    def render(self, messages: Sequence[Message]) -> SegmentedText:
        """Raises RowError: TEMPLATE_ERROR if the template raises or a message cannot be located; BAD_MESSAGES."""
        if self._continues and messages[-1].role != "assistant":
            message = "continue_final_message wants a last message of role assistant"
            raise RowError(RowErrorCode.BAD_MESSAGES, message)
        real = self._real_text(messages, add_generation_prompt=not self._continues)
        roles = tuple(message.role for message in messages)
        for live, hides_all in self._ways(messages):
            private = PrivateUse([self._template.source, real, *(message.content for message in messages)])
            located = self._locate(messages, live, private, hides_all)
            if located is None or private.restore(located.text) != real:
                continue
            scaffold = self._scaffolds.of(roles, live, add_generation_prompt=not self._continues)
            return self._segmented(messages, located, scaffold, private, hides_all)
        raise _error("a message cannot be located: the chat template changes with its text, or loses or repeats it")

    def _real_text(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        conversation = [(message.role, message.content) for message in messages]
        return self._template.render(conversation, add_generation_prompt=add_generation_prompt)

    def _ways(self, messages: Sequence[Message]) -> Iterator[tuple[tuple[bool, ...], bool]]:
        """(which messages get a mark, whether control tokens in assistant text are hidden), the preferred way first.

        Some templates ask whether a content is empty, and a mark would change the answer. Some take `<think>` blocks
        out of earlier assistant messages, and must be able to see them.
        """
        everything = (True,) * len(messages)
        not_empty = tuple(bool(message.content.strip()) for message in messages)
        for hides_all in (True, False):
            yield everything, hides_all
            if not_empty != everything:
                yield not_empty, hides_all

    def _locate(
        self, messages: Sequence[Message], live: Sequence[bool], private: PrivateUse, hides_all: bool
    ) -> _Located | None:
        """None unless the template renders each mark exactly once."""
        conversation = []
        num_marks = len(messages)
        for number, message in enumerate(messages):
            content, starts = self._hidden(message, private, hides_all)
            marks = [(start, private.mark(num_marks + place)) for place, start in enumerate(starts)]
            num_marks += len(starts)
            if live[number]:
                marks.append((len(content.rstrip()), private.mark(number)))
            conversation.append((message.role, _insert(content, marks)))
        try:
            rendered = self._template.render(conversation, add_generation_prompt=not self._continues)
        except RowError:
            return None
        text, places = private.find_marks(rendered)
        wanted = [number for number in range(num_marks) if number >= len(messages) or live[number]]
        if sorted(number for number, _ in places) != wanted:
            return None
        ends = tuple(place for place in places if place[0] < len(messages))
        return _Located(text, ends, tuple(offset for number, offset in places if number >= len(messages)))

    def _hidden(self, message: Message, private: PrivateUse, hides_all: bool) -> tuple[str, list[int]]:
        """A message's content without control tokens, and where its second and later parts start."""
        content = message.content
        if hides_all or message.role != "assistant":
            content = private.hide(content, self._tokenizer.control_starts)
        if not self._by_part or not message.is_bidirectional:
            return content, []
        starts, position = [], 0
        for part in message.parts:
            if part.strip() and content[:position].strip():  # a blank part is not a segment: templates may trim it away
                starts.append(position)
            position += len(part) + len(PART_SEPARATOR)
        return content, starts

    def _segmented(
        self, messages: Sequence[Message], located: _Located, scaffold: Scaffold, private: PrivateUse, hides_all: bool
    ) -> SegmentedText:
        borders, length = self._borders(messages, located, scaffold)
        pieces = self._tokenizer.split(located.text[:length])
        if not hides_all and control_ids(self._tokenizer.split(located.text)) != scaffold.control_ids:
            raise _error("a control token in assistant text would become one of the prompt")
        self._check_marks(pieces, located)
        restored = (Piece(private.restore(piece.text), piece.control_id) for piece in pieces)
        return SegmentedText(tuple(restored), borders)

    def _borders(
        self, messages: Sequence[Message], located: _Located, scaffold: Scaffold
    ) -> tuple[tuple[Border, ...], int]:
        """Borders, and the length of the text that is used: a message to be continued ends with its content."""
        if tuple(message for message, _ in located.ends) != scaffold.order:
            raise _error("the chat template orders the messages by their text")
        borders, position = self._before_messages(located.text, scaffold)
        for (number, end), closer in zip(located.ends, scaffold.closers, strict=True):
            borders.append(Border(position, messages[number].is_bidirectional))
            position = _after(located.text, end, messages[number].content, closer)
        if self._continues:
            number, end = located.ends[-1] if located.ends else (-1, 0)
            if number != len(messages) - 1:
                raise _error("the message to continue is not the last of the rendered prompt")
            position = _content_end(located.text, end, messages[number].content, scaffold.closers[-1] or "")
        else:
            borders.append(Border(position, False))
        borders += (Border(start, True) for start in located.part_starts)
        return _joined(borders), position if self._continues else len(located.text)

    def _before_messages(self, text: str, scaffold: Scaffold) -> tuple[list[Border], int]:
        if not text.startswith(scaffold.bos + scaffold.inserted):
            raise _error("the chat template's own beginning changes with the text of the messages")
        borders = [Border(0, False)] if scaffold.bos else []
        if scaffold.inserted:
            borders.append(Border(len(scaffold.bos), True))
        return borders, len(scaffold.bos + scaffold.inserted)

    def _check_marks(self, pieces: Sequence[Piece], located: _Located) -> None:
        ends = {end for _, end in located.ends}
        position = 0
        for piece in pieces:
            inside = range(position + 1, position + len(piece.text.rstrip()))
            if piece.control_id is not None and any(offset in ends for offset in inside):
                raise _error(
                    "a control token is put together from a message and what the chat template writes after it"
                )
            position += len(piece.text)


def _insert(content: str, marks: Sequence[tuple[int, str]]) -> str:
    pieces, position = [], 0
    for offset, mark in marks:
        pieces += [content[position:offset], mark]
        position = offset
    return "".join([*pieces, content[position:]])


def _content_end(text: str, end: int, content: str, closer: str) -> int:
    """Where a content ends in `text`, with as much of its trailing white space as the template has kept."""
    trailing = content[len(content.rstrip()) :]
    kept = common_length(trailing, text[end : end + len(trailing)])
    for spaces in range(kept, -1, -1):
        if text.startswith(closer, end + spaces):
            return end + spaces
    raise _error("the chat template closes a message otherwise than one of the same role")


def _after(text: str, end: int, content: str, closer: str | None) -> int:
    """Where a turn ends. -1 if the template merged it with the next one: `_joined` drops that border."""
    return -1 if closer is None else _content_end(text, end, content, closer) + len(closer)


def _joined(borders: Sequence[Border]) -> tuple[Border, ...]:
    """The borders in order of offset, without those between merged messages (-1). At one offset the last one counts."""
    by_offset = {border.offset: border for border in borders if border.offset >= 0}
    by_offset.setdefault(0, Border(0, False))
    return tuple(by_offset[offset] for offset in sorted(by_offset))


def _error(message: str) -> RowError:
    return RowError(RowErrorCode.TEMPLATE_ERROR, message)
