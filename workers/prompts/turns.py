"""What a chat template writes around messages: how turns open and close.

It is learned by rendering harmless canary messages, so that a row's own text cannot change it. Knows the template and
which strings are control tokens. Does not know rows.

A turn's `closer` is what follows its content, up to the next opener. After the last message of a role the template
writes it both with and without a generation header. A template that always writes the header shows it by what it
writes between two messages.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.chat_template import CALL, TOOL, ChatTemplate
from segue.workers.prompts.tokenizer import RunTokenizer

_OPEN, _SHUT = "\U000f0001", "\U000f0002"
_CANARY = re.compile(f"{_OPEN}(\\d+){_SHUT}")
_NAMED = re.compile(r"\S*(?:assistant|chatbot|model|\bAI\b)", re.IGNORECASE)  # how a header names who answers
_CALL = "call"  # stands for an assistant message that calls a tool
_CONTEXTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "system": (("system",), ("user", "assistant", "system")),
    "developer": (("developer",), ("system", "developer")),
    "user": (("user",), ("system", "user")),
    "assistant": (("user", "assistant"), ("system", "user", "assistant")),
    "tool": (("user", _CALL, "tool"), ("user", "assistant", "tool"), ("user", "tool")),
}
_TURNS: tuple[tuple[str, ...], ...] = (
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", _CALL, "tool", "assistant", "user"),
    ("user", "assistant", "tool"),
    ("user", "assistant", "system", "user"),
)


@dataclass(frozen=True, slots=True)
class Turns:
    """How the turns of one template open and close. Roles that it does not show are missing."""

    closers: Mapping[str, str] = field(default_factory=dict)
    openers: Mapping[str, str] = field(default_factory=dict)
    header: str = ""  # the generation header
    bos: str = ""  # the text of BOS if it stands outside of the messages
    structure: frozenset[int] = frozenset()  # control tokens that part messages

    def cut(self, gap: str, kept: int, before: str, after: str, controls: RunTokenizer) -> int | None:
        """Where in a gap between two contents the second one's turn begins; None if both are in one turn.

        `kept` is how much white space of the first content may stand at the beginning of the gap. Raises
        RowError(TEMPLATE_ERROR) if that cannot be told, and one of the two is an assistant's.
        """
        is_same = (before == "assistant") == (after == "assistant")
        closed = self._closed(gap, kept, before)
        if closed is not None and not (is_same and self.openers.get(after) and closed == len(gap)):
            return closed
        opened = self._opened(gap, after)
        if opened is not None:
            return opened
        found = self._found(gap, before, after, controls)
        if found is None and not is_same:
            raise _lost("does not close a turn of roles", (before, after))
        return found

    def inserted(self, head: str, role: str, controls: RunTokenizer) -> int:
        """The length of what the template writes before the first turn, such as a system prompt of its own."""
        opener, opened = self.openers.get(role, ""), self._opened(head, role)
        if opened is None and controls.has_control(opener) and opener in head:
            opened = head.index(opener)
        return opened if opened and head[:opened].strip() else 0

    def end(self, gap: str, kept: int, last: str, controls: RunTokenizer) -> int:
        """Where in the text after the last content its turn ends."""
        closed = self._closed(gap, kept, last)
        if closed is not None:
            return closed
        if self.header and gap.endswith(self.header):
            return len(gap) - len(self.header)
        found = self._found(gap, last, "assistant", controls)
        if found is None and last != "assistant" and self.header:
            raise _lost("does not close the last of roles", (last,))
        return len(gap) if found is None else found

    def _closed(self, gap: str, kept: int, role: str) -> int | None:
        """Where the turn ends, with the white space after its closer, if the gap begins with it."""
        closer = self.closers.get(role)
        for spaces in range(kept, -1, -1) if closer is not None else ():
            if gap.startswith(closer or "", spaces):
                return len(_with_space(gap, spaces + len(closer or "")))
        return None

    def _opened(self, gap: str, role: str) -> int | None:
        """Where the turn begins, if the gap ends with its opener. White space after it may be the content's."""
        opener = self.openers.get(role)
        for spaces in range(len(gap) - len(gap.rstrip()) + 1) if opener else ():
            if gap.endswith(opener or "", 0, len(gap) - spaces):
                return len(gap) - spaces - len(opener or "")
        return None

    def _found(self, gap: str, before: str, after: str, controls: RunTokenizer) -> int | None:
        """The border by a closer or an opener somewhere in the gap. Only those with a control token are looked for: no
        row can write these."""
        closer, opener = self.closers.get(before, ""), self.openers.get(after, "")
        for text in (closer, controls.last_control(closer)):
            if controls.has_control(text) and text in gap:
                return len(_with_space(gap, gap.index(text) + len(text)))
        call = self.closers.get(_CALL) if after == "tool" else ""
        if call and call in gap:
            return gap.rindex(call) + len(call)
        if controls.has_control(opener) and opener in gap:
            return gap.index(opener)
        beginnings = [text for text in (controls.first_control(opener), self._beginning(controls)) if text]
        return next((gap.rindex(text) for text in beginnings if text in gap), None)

    def _beginning(self, controls: RunTokenizer) -> str:
        """The control token that begins every turn, if there is one."""
        firsts = {controls.first_control(opener) for opener in self.openers.values()}
        return firsts.pop() if len(firsts) == 1 else ""


def learn_turns(template: ChatTemplate, tokenizer: RunTokenizer, bos: str, *, has_tools: bool = False) -> Turns:
    """The turns of a template, in chats with or without tools. `bos` is the text of the tokenizer's BOS, or ""."""
    return _Learner(template, tokenizer, bos, [TOOL] if has_tools else None).turns()


@dataclass(frozen=True, slots=True)
class _Rendering:
    text: str
    spans: tuple[tuple[int, int, int], ...]  # (message, start, end) of each content, in rendered order

    def gap(self, place: int) -> str:
        """The text between one content and the next, or after the last one."""
        following = self.spans[place + 1][1] if place + 1 < len(self.spans) else len(self.text)
        return self.text[self.spans[place][2] : following]

    @property
    def head(self) -> str:
        return self.text[: self.spans[0][1]]


class _Learner:
    def __init__(self, template: ChatTemplate, tokenizer: RunTokenizer, bos: str, tools: Sequence[Any] | None) -> None:
        self._tools = tools
        self._template = template
        self._tokenizer = tokenizer
        self._bos = bos
        self._closers: dict[str, str] = {}
        self._openers: dict[str, str] = {}

    def turns(self) -> Turns:
        forced = self._forced_header()
        for role, contexts in _CONTEXTS.items():
            self._learn_closer(role, contexts, forced)
        forced = forced or self._header_of_users()
        shown = [(turns, found) for turns in _TURNS if (found := self._in_order(turns)) is not None]
        for turns, found in shown:
            self._learn_openers([role for role in turns if role != _CALL], found, has_calls=_CALL in turns)
        if shown and "user" not in self._openers and shown[0][0][0] == "user":
            head = shown[0][1].head
            spans = self._tokenizer.control_spans(head)
            self._openers["user"] = head[spans[-1][1] :] if spans else head
        self._learn_results_opener()
        opens_turns = bool(self._bos) and any(found.text.count(self._bos) > 1 for _, found in shown)
        header = forced or self._written_header()
        structure = self._structure(shown, header)
        return Turns(self._closers, self._openers, header, "" if opens_turns else self._bos, structure)

    def _in_order(self, roles: Sequence[str]) -> _Rendering | None:
        shown = self._render(roles, False)
        numbers = [number for number, role in enumerate(roles) if role != _CALL]
        return shown if shown and [number for number, _, _ in shown.spans] == numbers else None

    def _learn_closer(self, role: str, contexts: Iterable[tuple[str, ...]], forced: str) -> None:
        for context in contexts:
            closed, opened = self._render(context, False), self._render(context, True)
            if closed and opened and closed.spans[-1][0] == opened.spans[-1][0] == len(context) - 1:
                ends = closed.gap(len(closed.spans) - 1), opened.gap(len(opened.spans) - 1)
                is_forced = bool(forced) and ends[1].endswith(forced)
                self._closers[role] = (ends[1].removesuffix(forced) if is_forced else self._common(*ends)).rstrip()
                break
        if role == "assistant" and not self._closers.get(role, "").strip():
            self._learn_answers_closer()

    def _learn_answers_closer(self) -> None:
        """Of a template that ends the last answer otherwise than those before: from what follows an answer."""
        for roles in _TURNS[:2]:
            middle, opened = self._in_order(roles), self._render(roles[:-1], True)
            if middle and opened:
                place = len(roles) - 2
                common = self._common(middle.gap(place), opened.gap(place))
                self._closers["assistant"] = self._before_opening(common).rstrip()
                return

    def _header_of_users(self) -> str:
        """The generation header of a template that writes it as the end of a user's turn; else "". It is taken off the
        closers."""
        closer, middle = self._closers.get("user", ""), self._in_order(_TURNS[0])
        if middle is None or not closer:
            return ""
        if middle.gap(0).strip() == closer.strip():
            header = self._header_in(closer)
        elif not middle.gap(0).startswith(closer):
            header = closer[self._common(closer, middle.gap(0)).rfind("\n") + 1 :].lstrip()
        else:
            return ""
        for role, text in self._closers.items():
            self._closers[role] = text.removesuffix(header).rstrip() if header else text
        return header

    def _header_in(self, closer: str) -> str:
        """What opens the answer, of a closer that does so: it begins a turn, or follows what closes an answer, too, or
        names the assistant."""
        before = self._before_opening(closer)
        answers = self._closers.get("assistant", "")
        if before != closer:
            return closer[len(before) :]
        if answers and closer.startswith(answers):
            return closer[len(answers) :].lstrip()
        named = _NAMED.search(closer)
        return closer[named.start() :] if named else ""

    def _forced_header(self) -> str:
        """The generation header of a template that writes it whether it is asked for or not; else ""."""
        for roles in _TURNS[:2]:
            middle, last, asked = self._in_order(roles), self._render(roles[:-1], False), self._render(roles[:-1], True)
            if middle is None or last is None or asked is None:
                continue
            place = len(roles) - 2
            end, between = last.gap(place), middle.gap(place)
            if last.text != asked.text or between.startswith(end.rstrip()):
                return ""
            return end[len(self._before_opening(self._common(end, between))) :]
        return ""

    def _before_opening(self, text: str) -> str:
        """`text` without what begins a turn, if it ends with it."""
        begins = self._begins_turns()
        return text[: text.rindex(begins)] if begins and begins in text[1:] else text

    def _begins_turns(self) -> str:
        """The first control token of the first turn."""
        shown = self._render(("user",), True) or self._render(("system", "user"), True)
        return self._tokenizer.first_control(shown.head.removeprefix(self._bos)) if shown else ""

    def _written_header(self) -> str:
        for roles in _TURNS[:2]:
            opened, closer = self._render(roles[:-2], True), self._closers.get("user")
            if opened and closer is not None:
                end = opened.gap(len(opened.spans) - 1)
                return end[len(_with_space(end, len(closer))) :] if end.startswith(closer) else ""
        return ""

    def _learn_openers(self, roles: Sequence[str], shown: _Rendering, *, has_calls: bool) -> None:
        for place in range(has_calls, len(roles) - 1):
            gap, closer = shown.gap(place), self._closers.get(roles[place])
            if closer is not None and gap.startswith(closer):
                self._openers.setdefault(roles[place + 1], gap[len(_with_space(gap, len(closer))) :])

    def _learn_results_opener(self) -> None:
        """What a tool's result opens with after a call: what follows the same chat without it."""
        call, result = self._render(("user", _CALL), False), self._render(("user", _CALL, "tool"), False)
        if call:
            self._closers[_CALL] = self._tokenizer.last_control(call.text)
        if call and result and len(result.spans) == 2:
            before = result.text[: result.spans[1][1]]
            opener = before[len(self._common(before, call.text)) :]
            if opener.strip():
                self._openers.setdefault("tool", opener)

    def _structure(self, shown: Sequence[tuple[tuple[str, ...], _Rendering]], header: str) -> frozenset[int]:
        """Control tokens that part messages: those before all contents but an answer's, and of those before an answer
        the ones that every answer begins with. The others are what an answer itself may say, such as `<think>`."""
        texts = [*self._closers.values(), self._bos]
        for turns, found in shown:
            roles = [role for role in turns if role != _CALL]
            gaps = [found.head, *(found.gap(place) for place in range(_CALL in turns, len(roles) - 1))]
            nexts = [roles[0], *roles[1 + (_CALL in turns) :]]
            texts += [gap for gap, role in zip(gaps, nexts, strict=True) if role != "assistant"]
        openings = [text for text in (self._openers.get("assistant", ""), header, *self._headers()) if text]
        always = [self._ids(opening) for opening in openings]
        return self._ids("\n".join(texts)).union(frozenset.intersection(*always) if always else ())

    def _headers(self) -> list[str]:
        """Generation headers with thinking on and off, as templates call it."""
        found = []
        for is_on in (True, False):
            kwargs = {"enable_thinking": is_on, "thinking": is_on}
            shown = self._render(("user",), True, kwargs)
            closer = self._closers.get("user", "")
            if shown and shown.gap(0).startswith(closer):
                found.append(shown.gap(0)[len(closer) :])
        return found

    def _ids(self, text: str) -> frozenset[int]:
        return frozenset(token for _, _, token in self._tokenizer.control_spans(text))

    def _common(self, first: str, second: str) -> str:
        return first[: len(self._whole_tokens(first, common_length(first, second)))]

    def _whole_tokens(self, text: str, length: int) -> str:
        """The first `length` characters of `text`, without a control token of which only a part is left."""
        position = 0
        for piece in self._tokenizer.split(text):
            if piece.control_id is not None and position < length < position + len(piece.text):
                return text[:position]
            position += len(piece.text)
        return text[:length]

    def _render(
        self, roles: Sequence[str], add_generation_prompt: bool, kwargs: Mapping[str, bool] | None = None
    ) -> _Rendering | None:
        messages = [_message(number, role) for number, role in enumerate(roles)]
        try:
            text = self._template.render(
                messages, add_generation_prompt=add_generation_prompt, tools=self._tools, kwargs=kwargs
            )
        except RowError:
            return None
        spans = tuple((int(match.group(1)), *match.span()) for match in _CANARY.finditer(text))
        wanted = [number for number, role in enumerate(roles) if role != _CALL]
        return _Rendering(text, spans) if sorted(span[0] for span in spans) == wanted else None


def common_length(first: str, second: str) -> int:
    """The number of characters that two strings have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _message(number: int, role: str) -> dict[str, object]:
    if role == _CALL:
        return {"role": "assistant", "content": "", "tool_calls": [CALL]}
    message: dict[str, object] = {"role": role, "content": f"{_OPEN}{number}{_SHUT}"}
    return message | {"tool_call_id": CALL["id"], "name": "look_up"} if role == "tool" else message


def _with_space(gap: str, length: int) -> str:
    return gap[: len(gap) - len(gap[length:].lstrip())]


def _lost(what: str, roles: Sequence[str]) -> RowError:
    shown = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
    return RowError(RowErrorCode.TEMPLATE_ERROR, f"the chat template {what} {shown}")
