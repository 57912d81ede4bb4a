"""Where the reasoning in an answer begins and ends, by the markers that the chat template writes around it.

Knows templates, tokens and text; no engine, no row.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from segue.workers.errors import RowError
from segue.workers.prompts.chat_template import ChatTemplate

_R, _C = "\U000f0007", "\U000f0008"  # characters that no template looks for or writes
# Of templates that leave reasoning out of what they show, or find it in the answer's text.
_KNOWN = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)
_HEADER_TOKENS = 96  # at the end of a prompt, in which a header that opens the reasoning is looked for


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The texts around reasoning in an answer, control tokens among them."""

    start: str
    end: str
    end_of_turn: str = ""  # what ends an answer in a prompt


def learn_markers(template: ChatTemplate) -> ReasoningMarkers | None:
    """The markers of a template; None if it knows of no reasoning."""
    return _shown(template) or next(
        (ReasoningMarkers(*pair) for pair in _KNOWN if pair[1] in template.source or pair[0] in template.source), None
    )


def _shown(template: ChatTemplate) -> ReasoningMarkers | None:
    """From a chat whose last answer has reasoning: what stands before it that the same chat without it lacks, and what
    stands between it and the answer."""
    answer = {"role": "assistant", "content": _C}
    texts = []
    for message in (answer, answer | {"reasoning_content": _R}):
        try:
            texts.append(template.render([{"role": "user", "content": "x"}, message], add_generation_prompt=False))
        except RowError:
            return None
    before, found, after = texts[1].partition(_R)
    between, is_there, _ = after.partition(_C)
    if not found or not is_there or not between.strip():
        return None
    opening = texts[0].partition(_C)[0]
    start = before[_common(opening, before) :].strip() or before.split()[-1]
    return ReasoningMarkers(start, between.strip())


def _common(first: str, second: str) -> int:
    """How far two texts agree, in whole lines and words: a marker must not be cut."""
    length = next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    return length if length == len(second) else max(second.rfind(text, 0, length) for text in ("\n", ">", "]", " ")) + 1


class ReasoningSplitter:
    """Splits generated answers."""

    def __init__(self, markers: ReasoningMarkers, tokenizer: Any) -> None:
        self._markers = markers
        self._tokenizer = tokenizer

    def split(self, prompt: Sequence[int], answer: Sequence[int], text: str) -> tuple[str | None, str]:
        """(the reasoning or None, the text after it) of an answer's tokens and their text, which may be shorter: a stop
        string cuts it."""
        written = self._decode(answer, skips=False)
        begin = self._begin(prompt, written)
        if begin is None:
            return None, text
        end = written.find(self._markers.end, begin)
        if end < 0:
            return self._said(answer, written, begin, len(written), text).strip(), ""
        reasoning = self._said(answer, written, begin, end, text).strip()
        rest = self._tokens_before(answer, end + len(self._markers.end))
        before = self._decode(answer[:rest], skips=True)
        after = text[len(before) :] if text.startswith(before) else ""
        return reasoning, after.lstrip()

    def _begin(self, prompt: Sequence[int], written: str) -> int | None:
        """Where the reasoning begins in the answer; None if there is none."""
        start = self._markers.start
        space = len(written) - len(written.lstrip())
        if written.startswith(start, space):
            return space + len(start)
        header = self._decode(prompt[-_HEADER_TOKENS:], skips=False)
        before = self._markers.end_of_turn
        header = header[header.rfind(before) + len(before) :] if before in header else header
        return 0 if header.rfind(start) > header.rfind(self._markers.end) else None

    def _said(self, answer: Sequence[int], written: str, begin: int, end: int, text: str) -> str:
        """The text of a part of the answer, without control tokens, as far as `text` goes."""
        first, last = self._tokens_before(answer, begin), self._tokens_before(answer, end)
        before, said = self._decode(answer[:first], skips=True), self._decode(answer[:last], skips=True)
        said = said if text.startswith(said) else text
        return said[len(before) :]

    def _tokens_before(self, answer: Sequence[int], offset: int) -> int:
        """How many tokens write the first `offset` characters."""
        lengths = range(len(answer) + 1)
        return bisect_left(lengths, offset, key=lambda count: len(self._decode(answer[:count], skips=False)))

    def _decode(self, tokens: Sequence[int], *, skips: bool) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skips, clean_up_tokenization_spaces=False)
