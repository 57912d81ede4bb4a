"""What a chat template writes around messages: how each turn opens and closes, for a given sequence of roles.

It is learned by rendering harmless canary messages, so that a row's own text cannot change it. Knows the template and
which strings are control tokens. Does not know rows.

A turn's `closer` is what is written after its content, up to the next opener. After the last message of a role the
template writes it both with and without a generation header. It is then found again in the gap between two messages,
with the white space after it. A gap without it means that the template merged two messages into one turn.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.chat_template import ChatTemplate
from segue.workers.prompts.tokenizer import RunTokenizer, control_ids

Live = tuple[bool, ...]  # which messages have content that can be located
_OPEN, _SHUT = "\U000f0001", "\U000f0002"
_CANARY = re.compile(f"{_OPEN}(\\d+){_SHUT}")
_MAX_KNOWN = 4096
_CONTEXTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "system": (("system",),),
    "user": (("user",), ("system", "user")),
    "assistant": (("user", "assistant"), ("system", "user", "assistant")),
    "tool": (("user", "assistant", "tool"), ("system", "user", "assistant", "tool"), ("user", "tool")),
}
_TURNS: tuple[tuple[str, ...], ...] = (("user", "assistant", "user"), ("system", "user", "assistant", "user"))


@dataclass(frozen=True, slots=True)
class Scaffold:
    """What the template writes around one sequence of roles."""

    order: tuple[int, ...]  # located messages in rendered order
    bos: str  # the text of BOS if it stands outside the first message, else ""
    inserted: str  # the template's own system prompt before the first message, or ""
    closers: tuple[str | None, ...]  # after each message of `order`; None if it is merged with the next one
    control_ids: tuple[int, ...]  # control tokens of the whole prompt


@dataclass(frozen=True, slots=True)
class _Rendering:
    text: str
    spans: tuple[tuple[int, int, int], ...]  # (message, start, end) of each content, in rendered order

    def gap(self, place: int) -> str:
        """The text between one content and the next, or after the last one."""
        following = self.spans[place + 1][1] if place + 1 < len(self.spans) else len(self.text)
        return self.text[self.spans[place][2] : following]


class Scaffolds:
    """Learns the scaffolds of one template and remembers them. `bos` is the text of the tokenizer's BOS, or ""."""

    def __init__(self, template: ChatTemplate, tokenizer: RunTokenizer, bos: str) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._bos = bos
        self._known: dict[tuple[tuple[str, ...], Live, bool], Scaffold] = {}
        self._tails = {role: self._learn_tail(role) for role in _CONTEXTS}
        self._openers: dict[str, str] = {}
        self._bos_opens_turns = False
        self._learn_openers()

    def of(self, roles: tuple[str, ...], live: Live, *, add_generation_prompt: bool) -> Scaffold:
        """Raises RowError(TEMPLATE_ERROR) if the template cannot render these roles or does not show every message."""
        key = (roles, live, add_generation_prompt)
        if key not in self._known:
            if len(self._known) >= _MAX_KNOWN:  # rows choose their roles, so there is no end to these
                self._known.clear()
            self._known[key] = self._learn(roles, live, add_generation_prompt)
        return self._known[key]

    def _learn(self, roles: tuple[str, ...], live: Live, add_generation_prompt: bool) -> Scaffold:
        shown = self._render(roles, live, add_generation_prompt)
        if shown is None:
            raise _lost("loses or repeats a message of roles", roles)
        order = tuple(message for message, _, _ in shown.spans)
        in_order = tuple(roles[message] for message in order)
        head = shown.text[: shown.spans[0][1]] if shown.spans else ""
        bos = self._bos if head.startswith(self._bos) and not self._bos_opens_turns else ""
        closers = tuple(self._closer(shown, in_order, place) for place in range(len(order)))
        self._check_openings(shown, roles)
        inserted = self._inserted(head[len(bos) :], in_order)
        return Scaffold(order, bos, inserted, closers, control_ids(self._tokenizer.split(_CANARY.sub("x", shown.text))))

    def _closer(self, shown: _Rendering, roles: Sequence[str], place: int) -> str | None:
        gap, tail = shown.gap(place), self._tails[roles[place]]
        is_last = place + 1 == len(roles)
        closer = None
        if tail is not None and gap.startswith(tail):
            closer = _with_space(gap, len(tail))
        if is_last:
            if closer is None:
                raise _lost("does not close the last of roles", roles)
            return closer
        return self._between(gap, closer, roles[place], roles[place + 1])

    def _between(self, gap: str, closer: str | None, role: str, following: str) -> str | None:
        if (role == "assistant") != (following == "assistant"):
            if closer is None:
                raise _lost("does not close a turn of roles", (role, following))
            return closer
        opener = self._openers.get(following, "")
        if closer is not None and (closer != gap or not opener):
            return closer
        return gap.removesuffix(opener) if opener and gap.endswith(opener) else None

    def _inserted(self, head: str, roles: Sequence[str]) -> str:
        """The template's own system prompt: what it writes before the first message's usual opener."""
        opener = self._openers.get(roles[0], "") if roles else ""
        if not opener or roles[0] == "system" or not head.endswith(opener):
            return ""
        before = head.removesuffix(opener)
        return before if before.strip() else ""

    def _learn_tail(self, role: str) -> str | None:
        for context in _CONTEXTS[role]:
            live = (True,) * len(context)
            closed, opened = self._render(context, live, False), self._render(context, live, True)
            if closed and opened and closed.spans[-1][0] == opened.spans[-1][0] == len(context) - 1:
                after = opened.gap(len(context) - 1)
                return self._whole_tokens(after, common_length(after, closed.gap(len(context) - 1)))
        return None

    def _learn_openers(self) -> None:
        for turns in _TURNS:
            shown = self._render(turns, (True,) * len(turns), False)
            if shown is None or [message for message, _, _ in shown.spans] != list(range(len(turns))):
                continue
            for place in (len(turns) - 3, len(turns) - 2):
                gap, tail = shown.gap(place), self._tails[turns[place]]
                if tail is not None and gap.startswith(tail):
                    self._openers[turns[place + 1]] = gap[len(_with_space(gap, len(tail))) :]
            self._bos_opens_turns = shown.text.count(self._bos) > 1 if self._bos else False
            return

    def _whole_tokens(self, text: str, length: int) -> str:
        """The first `length` characters of `text`, without a control token of which only a part is left."""
        position = 0
        for piece in self._tokenizer.split(text):
            if piece.control_id is not None and position < length < position + len(piece.text):
                return text[:position]
            position += len(piece.text)
        return text[:length]

    def _check_openings(self, shown: _Rendering, roles: Sequence[str]) -> None:
        # If a template wrote "<|im_end|" right before a content, a row could complete the token with ">".
        for control in self._tokenizer.control_ids:
            beginnings = tuple(control[:length] for length in range(1, len(control)))
            if any(shown.text.endswith(beginnings, 0, start) for _, start, _ in shown.spans):
                raise _lost("writes the beginning of a control token right before a content, roles", roles)

    def _render(self, roles: Sequence[str], live: Live, add_generation_prompt: bool) -> _Rendering | None:
        contents = [f"{_OPEN}{number}{_SHUT}" if shown else "" for number, shown in enumerate(live)]
        try:
            text = self._template.render(
                list(zip(roles, contents, strict=True)), add_generation_prompt=add_generation_prompt
            )
        except RowError:
            return None
        spans = tuple((int(match.group(1)), *match.span()) for match in _CANARY.finditer(text))
        wanted = [number for number, shown in enumerate(live) if shown]
        return _Rendering(text, spans) if sorted(span[0] for span in spans) == wanted else None


def common_length(first: str, second: str) -> int:
    """The number of characters that two strings have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _with_space(gap: str, length: int) -> str:
    return gap[: len(gap) - len(gap[length:].lstrip())]


def _lost(what: str, roles: Sequence[str]) -> RowError:
    shown = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
    return RowError(RowErrorCode.TEMPLATE_ERROR, f"the chat template {what} {shown}")
