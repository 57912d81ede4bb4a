"""The turns of a chat template, learned from harmless canary messages, so that a row's own text cannot change them.

After the last message of a role the template writes its closer both with and without a generation header. A template
that always writes the header shows it by what it writes between two messages. Knows the template and which strings are
control tokens. Does not know rows.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segue.workers.errors import RowError
from segue.workers.prompts.chat_template import CALL, TOOL, ChatTemplate
from segue.workers.prompts.tokenizer import RunTokenizer
from segue.workers.prompts.turns import CALL_TURN, Turns, common_length, first_control, last_control, with_space

_OPEN, _SHUT = "\U000f0001", "\U000f0002"
_CANARY = re.compile(f"{_OPEN}(\\d+){_SHUT}")
_NAMED = re.compile(r"\S*(?:assistant|chatbot|model|\bAI\b)", re.IGNORECASE)  # how a header names who answers
_CONTEXTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "system": (("system",), ("user", "assistant", "system")),
    "developer": (("developer",), ("system", "developer")),
    "user": (("user",), ("system", "user")),
    "assistant": (("user", "assistant"), ("system", "user", "assistant")),
    "tool": (("user", CALL_TURN, "tool"), ("user", "assistant", "tool"), ("user", "tool")),
}
_TURNS: tuple[tuple[str, ...], ...] = (
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", CALL_TURN, "tool", "assistant", "user"),
    ("user", "assistant", "tool"),
    ("user", "assistant", "system", "user"),
)


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
            self._learn_openers([role for role in turns if role != CALL_TURN], found, has_calls=CALL_TURN in turns)
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
        numbers = [number for number, role in enumerate(roles) if role != CALL_TURN]
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
        return first_control(shown.head.removeprefix(self._bos), self._tokenizer) if shown else ""

    def _written_header(self) -> str:
        for roles in _TURNS[:2]:
            opened, closer = self._render(roles[:-2], True), self._closers.get("user")
            if opened and closer is not None:
                end = opened.gap(len(opened.spans) - 1)
                return end[len(with_space(end, len(closer))) :] if end.startswith(closer) else ""
        return ""

    def _learn_openers(self, roles: Sequence[str], shown: _Rendering, *, has_calls: bool) -> None:
        for place in range(has_calls, len(roles) - 1):
            gap, closer = shown.gap(place), self._closers.get(roles[place])
            if closer is not None and gap.startswith(closer):
                self._openers.setdefault(roles[place + 1], gap[len(with_space(gap, len(closer))) :])

    def _learn_results_opener(self) -> None:
        """What a tool's result opens with after a call: what follows the same chat without it."""
        call, result = self._render(("user", CALL_TURN), False), self._render(("user", CALL_TURN, "tool"), False)
        if call:
            self._closers[CALL_TURN] = last_control(call.text, self._tokenizer)
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
            roles = [role for role in turns if role != CALL_TURN]
            gaps = [found.head, *(found.gap(place) for place in range(CALL_TURN in turns, len(roles) - 1))]
            nexts = [roles[0], *roles[1 + (CALL_TURN in turns) :]]
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
        wanted = [number for number, role in enumerate(roles) if role != CALL_TURN]
        return _Rendering(text, spans) if sorted(span[0] for span in spans) == wanted else None


def _message(number: int, role: str) -> dict[str, object]:
    if role == CALL_TURN:
        return {"role": "assistant", "content": "", "tool_calls": [CALL]}
    message: dict[str, object] = {"role": role, "content": f"{_OPEN}{number}{_SHUT}"}
    return message | {"tool_call_id": CALL["id"], "name": "look_up"} if role == "tool" else message
