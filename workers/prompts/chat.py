"""A conversation as pieces of text with borders between its segments, whatever the model's chat template does to it.

A private mark after each content shows where the template put it. Without the marks the rendering must be the real one.
Control tokens in the row's own text are hidden from the template and stay text. Knows templates and messages. Does not
know columns, presets or token ids.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.chat_template import ChatTemplate
from segue.workers.prompts.conversation import Chat, Message
from segue.workers.prompts.disguise import Controls, Disguise
from segue.workers.prompts.handover import Handover, Marks, marks_of
from segue.workers.prompts.private_use import PrivateUse
from segue.workers.prompts.reasoning import learn_markers
from segue.workers.prompts.tokenizer import Piece, RunTokenizer
from segue.workers.prompts.turn_learner import learn_turns
from segue.workers.prompts.turns import Turns, common_length


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


Places = Sequence[tuple[int, int]]  # (number of a mark, offset) in order
Span = tuple[int, int, int]  # (message, start, end); the end has no white space


class ChatRenderer:
    """Renders conversations with one template. Borders are found for the segment mask only."""

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: RunTokenizer,
        *,
        bos: str,
        mask: str = "segment",
        segment_by: Literal["message", "part"] = "message",
        continue_final_message: bool = False,
    ) -> None:
        self.template = template
        self._tokenizer = tokenizer
        self._bos = bos
        self._is_segmented = mask == "segment"
        self._by_part = self._is_segmented and segment_by == "part"
        self._controls = Controls(tokenizer)
        self._handover = Handover(template, continues=continue_final_message)
        self._continues = continue_final_message

    @cached_property
    def _turns(self) -> Turns:
        """Learned from chats without tools, unless the template wants some."""
        turns = learn_turns(self.template, self._tokenizer, self._bos)
        return turns if turns.closers else learn_turns(self.template, self._tokenizer, self._bos, has_tools=True)

    @cached_property
    def live(self) -> frozenset[int]:
        """The markers that assistant text and the author's text keep: control tokens that are not special and part no
        messages, such as `<think>`."""
        ids = self._tokenizer.control_ids
        named = {ids.get(token) for token in self.template.special_tokens}
        markers = learn_markers(self.template)
        reasoning = {ids.get(markers.start), ids.get(markers.end)} if markers else set()
        kept_out = self._tokenizer.special_ids | named | (self._turns.structure - reasoning)
        return frozenset(ids.values()) - kept_out

    def answer_end_id(self) -> int | None:
        """The control token that the template writes after an answer; None if it writes none."""
        answer = "\U000f0003"  # a character that no template looks for or writes
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        text = self.template.render(messages, add_generation_prompt=False)
        pieces = self._tokenizer.split(text.rpartition(answer)[2])
        return next((piece.control_id for piece in pieces if piece.control_id is not None), None)

    def render(self, chat: Chat) -> SegmentedText:
        """Raises RowError: TEMPLATE_ERROR if the template raises or a message cannot be located; BAD_MESSAGES."""
        chat = self._handover.adapted(chat)
        private = PrivateUse([*self.template.constants, *chat.strings])
        real = self._handover.rendered(chat, private)
        for disguise, marks in self._ways(chat, private):
            try:
                rendered = self._handover.rendered(chat, private, disguise, marks)
            except RowError:
                continue
            text, places = private.find_marks(disguise.hidden(rendered))
            if private.restore(text) == real:
                return self._segmented(chat, text, places, marks, private)
        raise _error("the chat template changes with the text of its messages")

    def _ways(self, chat: Chat, private: PrivateUse) -> Iterator[tuple[Disguise, Marks]]:
        """How to disguise the row's text, and what to mark, the preferred way first.

        Some templates ask whether a content is empty, and a mark would change the answer. Some look for control tokens
        in a content, and must be able to see them.
        """
        for shields in (False, True):
            disguise = Disguise(private, self._controls, self.live, shields)
            yield from ((disguise, marks) for marks in marks_of(chat.messages, by_part=self._by_part))

    def _segmented(self, chat: Chat, text: str, places: Places, marks: Marks, private: PrivateUse) -> SegmentedText:
        spans = _spans(chat, private.restore(text), places, marks)
        pieces = self._tokenizer.split(text)
        _check_marks(pieces, {end for _, _, end in spans})
        borders = (Border(0, False),)
        if self._is_segmented:
            parts = (Border(offset, True) for place, offset in places if place >= marks.first_part)
            borders = _joined([*self._borders(chat, text, spans), *parts])
        restored = (Piece(private.restore(piece.text), piece.control_id) for piece in pieces)
        return SegmentedText(tuple(restored), borders)

    def _borders(self, chat: Chat, text: str, spans: Sequence[Span]) -> Iterator[Border]:
        if not spans:
            yield Border(0, False)
            return
        turns = self._turns
        roles = [chat.messages[number].role for number, _, _ in spans]
        yield from self._before(text[: spans[0][1]], roles[0], turns)
        for place, (number, _, end) in enumerate(spans):
            kept = _kept_space(chat.messages[number], text[end:])
            if place + 1 < len(spans):
                cut = turns.cut(text[end : spans[place + 1][1]], kept, roles[place], roles[place + 1], self._tokenizer)
                if cut is not None:
                    yield Border(end + cut, roles[place + 1] != "assistant")
            elif not self._continues:
                yield Border(end + turns.end(text[end:], kept, roles[place], self._tokenizer), False)
            elif number != len(chat.messages) - 1:
                raise _error("the message to continue is not the last of the rendered prompt")

    def _before(self, head: str, role: str, turns: Turns) -> Iterator[Border]:
        """Borders up to the first message: BOS, and what the template itself writes before it."""
        start = len(turns.bos) if turns.bos and head.startswith(turns.bos) else 0
        if start:
            yield Border(0, False)
        inserted = 0 if role == "system" else turns.inserted(head[start:], role, self._tokenizer)
        if inserted:
            yield Border(start, True)
        yield Border(start + inserted, role != "assistant")


def _spans(chat: Chat, real: str, places: Places, marks: Marks) -> list[Span]:
    """Where the messages are, in rendered order. Raises RowError(TEMPLATE_ERROR) if one is lost or repeated."""
    found: dict[int, list[int]] = {}
    for mark, offset in places:
        found.setdefault(mark, []).append(offset)
    spans = []
    for number, message in enumerate(chat.messages):
        contents = found.get(marks.content(number), [])
        calls = [found.get(mark, []) for mark in marks.named(number)]
        if len(contents) > 1:
            raise _error(f"the chat template repeats message {number}, of role {message.role}")
        if not all(calls) or (message.content.strip() and not contents and not calls):
            raise _error(f"the chat template loses message {number}, of role {message.role}, or a call of it")
        if contents or calls:
            starts = [_start(real, end, message) for end in contents] + [call[0] for call in calls]
            ends = [call[0] for call in calls] or contents
            spans.append((number, min(starts), max(ends)))
    return sorted(spans, key=lambda span: span[2])


def _start(real: str, end: int, message: Message) -> int:
    """Where the content that ends here begins, as far as the template has left it as it is."""
    for part in reversed(message.texts if message.is_list else (message.content,)):
        text = part.strip()
        start = real.rfind(text, 0, end) if text else end
        if start < 0 or real[start + len(text) : end].strip():
            break
        end = start
    return end


def _check_marks(pieces: Sequence[Piece], ends: Collection[int]) -> None:
    """No control token may reach over the end of a message. None does as long as the edges of texts are hidden."""
    position = 0
    for piece in pieces:
        inside = range(position + 1, position + len(piece.text.rstrip()))
        if piece.control_id is not None and any(offset in ends for offset in inside):
            raise _error("a control token is put together from a message and what the chat template writes after it")
        position += len(piece.text)


def _kept_space(message: Message, after: str) -> int:
    """How much of the white space at the end of a content the template has kept."""
    content = message.content
    return common_length(content[len(content.rstrip()) :], after)


def _joined(borders: Iterable[Border]) -> tuple[Border, ...]:
    """The borders in order of offset. At one offset the last one counts."""
    by_offset = {border.offset: border for border in borders}
    by_offset.setdefault(0, Border(0, False))
    return tuple(by_offset[offset] for offset in sorted(by_offset))


def _error(message: str) -> RowError:
    return RowError(RowErrorCode.TEMPLATE_ERROR, message)
