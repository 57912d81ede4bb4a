"""How the turns of a chat template open and close, and where in a rendered text one message's turn ends.

A turn's `closer` is what follows its content, up to the next opener. Knows strings and which of them are control
tokens. Does not know templates or rows; `workers/prompts/turn_learner.py` finds the turns of a template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.tokenizer import RunTokenizer

CALL_TURN = "call"  # stands for an assistant message that calls a tool


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
        if opened is None and _has_control(opener, controls) and opener in head:
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
                return len(with_space(gap, spaces + len(closer or "")))
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
        for text in (closer, last_control(closer, controls)):
            if _has_control(text, controls) and text in gap:
                return len(with_space(gap, gap.index(text) + len(text)))
        call = self.closers.get(CALL_TURN) if after == "tool" else ""
        if call and call in gap:
            return gap.rindex(call) + len(call)
        if _has_control(opener, controls) and opener in gap:
            return gap.index(opener)
        beginnings = [text for text in (first_control(opener, controls), self._beginning(controls)) if text]
        return next((gap.rindex(text) for text in beginnings if text in gap), None)

    def _beginning(self, controls: RunTokenizer) -> str:
        """The control token that begins every turn, if there is one."""
        firsts = {first_control(opener, controls) for opener in self.openers.values()}
        return firsts.pop() if len(firsts) == 1 else ""


def common_length(first: str, second: str) -> int:
    """The number of characters that two strings have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def first_control(text: str, tokenizer: RunTokenizer) -> str:
    """The first control token in a text, or ""."""
    spans = tokenizer.control_spans(text)
    return text[spans[0][0] : spans[0][1]] if spans else ""


def last_control(text: str, tokenizer: RunTokenizer) -> str:
    """The last control token in a text, or ""."""
    spans = tokenizer.control_spans(text)
    return text[spans[-1][0] : spans[-1][1]] if spans else ""


def with_space(gap: str, length: int) -> str:
    """The beginning of a gap of this length, with the white space after it."""
    return gap[: len(gap) - len(gap[length:].lstrip())]


def _has_control(text: str, tokenizer: RunTokenizer) -> bool:
    return bool(text) and bool(tokenizer.control_spans(text))


def _lost(what: str, roles: Sequence[str]) -> RowError:
    shown = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
    return RowError(RowErrorCode.TEMPLATE_ERROR, f"the chat template {what} {shown}")
