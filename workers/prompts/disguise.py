"""Text of a row, made so that no template can turn it into a control token.

What is hidden: the first character of every control token in it; its last or first character, if a control token could
begin or end with it, since a template may put another text there; and a short text that lies inside a control token.
So no template can build one with a row's help, whatever it does around the text. What an assistant says, and what the
job's author wrote, keeps the markers that are not hidden from it (`workers/prompts/markers.py`). Knows strings and
which of them are control tokens. Does not know templates.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segue.workers.prompts.conversation import Span
from segue.workers.prompts.json_values import with_strings
from segue.workers.prompts.private_use import PrivateUse
from segue.workers.prompts.tokenizer import RunTokenizer

# Words of JSON schemas and of OpenAI's format, which templates compare with their own.
_WORDS = frozenset(
    {"function", "string", "number", "integer", "boolean", "object", "array", "null", "type", "name", "description",
     "parameters", "arguments", "properties", "required", "items", "enum", "default", "id", "format", "title",
     "strict", "additionalProperties", "return", "response", "tool_calls", "tool_call_id", "content", "role", "text"}
)  # fmt: skip
_BLANK = "\U000f0006"


class Controls:
    """Where a text has, or could become a part of, one of a tokenizer's control tokens."""

    def __init__(self, tokenizer: RunTokenizer) -> None:
        self._tokenizer = tokenizer
        names = list(tokenizer.control_ids)
        self._beginnings = frozenset(name[:length] for name in names for length in range(1, len(name)))
        self._endings = frozenset(name[-length:] for name in names for length in range(1, len(name)))
        self._longest = max(map(len, names), default=0)
        self._joined = "\0".join(names)

    def places(self, text: str, live: frozenset[int], spans: Sequence[Span]) -> list[int]:
        """The places that must be hidden. Tokens of `live` inside one of the spans are not."""
        if not text or text in _WORDS:
            return []
        found: list[int] = []
        while new := [place for place in self._next(text, live, spans) if place not in found]:
            found += new
            characters = list(text)
            for place in new:
                characters[place] = _BLANK
            text = "".join(characters)
        return sorted(found)

    def _next(self, text: str, live: frozenset[int], spans: Sequence[Span]) -> list[int]:
        tokens = self._tokenizer.control_spans(text)
        kept = [(start, end) for start, end, token in tokens if token in live and _is_inside(start, end, spans)]
        hidden = {start for start, end, _ in tokens if (start, end) not in kept}
        edges = {place for place in self._edges(text) if not _is_in_any(place, kept)}
        return sorted(hidden | edges)

    def _edges(self, text: str) -> Iterator[int]:
        for start, end in {(0, len(text)), (len(text) - len(text.lstrip()), len(text.rstrip()))}:
            if start >= end:
                continue
            lengths = range(1, min(self._longest, end - start) + 1)
            if any(text[end - length : end] in self._beginnings for length in lengths):
                yield end - 1
            if any(text[start : start + length] in self._endings for length in lengths):
                yield start
            if end - start < self._longest and text[start:end] in self._joined:
                yield start


@dataclass(frozen=True, slots=True)
class Disguise:
    """How the text of one row is handed to a template."""

    private: PrivateUse
    controls: Controls
    live: frozenset[int]  # markers that assistant text and the author's keep
    shields: bool = False  # the template can see the control tokens; else they are hidden from it

    def text(self, text: str, *, is_assistant: bool = False, author: Sequence[Span] = ()) -> str:
        spans = ((0, len(text)),) if is_assistant else author
        places = self.controls.places(text, self.live, spans)
        return self.private.shield(text, places) if self.shields else self.private.hide(text, places)

    def value(self, value: Any, *, is_assistant: bool = False) -> Any:
        """A JSON value, with all its strings disguised."""
        return with_strings(value, lambda text: self.text(text, is_assistant=is_assistant))

    def values(self, named: Mapping[str, Any], *, is_assistant: bool = False) -> dict[str, Any]:
        """The values of names that are a template's own."""
        return {name: self.value(each, is_assistant=is_assistant) for name, each in named.items()}

    def hidden(self, rendered: str) -> str:
        """A rendered text, in which the same characters are hidden however the row's text was handed over."""
        return self.private.hide_shielded(rendered) if self.shields else rendered


def _is_inside(start: int, end: int, spans: Sequence[Span]) -> bool:
    return any(first <= start and end <= stop for first, stop in spans)


def _is_in_any(place: int, spans: Sequence[Span]) -> bool:
    return any(start <= place < end for start, end in spans)
