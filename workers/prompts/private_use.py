"""Characters that stand in for others while a prompt is rendered, and marks that show where the template put text.

They come from Unicode's private use plane 15, in an order that each process draws anew, and never occur in the text
that they are used with. So a row can neither guess nor forge them. Does not know templates or tokenizers.
"""

import re
import secrets
from collections.abc import Callable, Iterator, Sequence

from segue.workers.errors import RowError, RowErrorCode

_PLANE_15 = range(0xF0010, 0xFFFFE)
_ORDER: list[str] = []


class PrivateUse:
    """Stand-ins and marks for one row. `avoid` is all text that they will be mixed with."""

    def __init__(self, avoid: Sequence[str]) -> None:
        self._fresh = _unused(avoid)
        self._mark = self._take()
        self._marks = re.compile(f"{self._mark}(\\d+){self._mark}")
        self._stand_ins: dict[str, str] = {}

    def mark(self, number: int) -> str:
        """Text that shows after rendering where place `number` is."""
        return f"{self._mark}{number}{self._mark}"

    def find_marks(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """`text` without marks, and (number, offset in that text) of each mark in order."""
        places, kept, position, length = [], [], 0, 0
        for match in self._marks.finditer(text):
            kept.append(text[position : match.start()])
            length += len(kept[-1])
            places.append((int(match.group(1)), length))
            position = match.end()
        return "".join([*kept, text[position:]]), places

    def hide(self, text: str, find_starts: Callable[[str], list[int]]) -> str:
        """`text`, in which the characters that `find_starts` finds are replaced until it finds none."""
        while starts := find_starts(text):
            characters = list(text)
            for start in starts:
                characters[start] = self._stand_in(characters[start])
            text = "".join(characters)
        return text

    def restore(self, text: str) -> str:
        """`text` with its own characters again, where `hide` replaced them."""
        return text.translate({ord(stand_in): character for character, stand_in in self._stand_ins.items()})

    def _stand_in(self, character: str) -> str:
        if character not in self._stand_ins:
            self._stand_ins[character] = self._take()
        return self._stand_ins[character]

    def _take(self) -> str:
        for character in self._fresh:
            return character
        raise RowError(
            RowErrorCode.TEMPLATE_ERROR, "the prompt uses up all characters of Unicode's private use plane 15"
        )


def _unused(avoid: Sequence[str]) -> Iterator[str]:
    if not _ORDER:
        _ORDER.extend(map(chr, secrets.SystemRandom().sample(_PLANE_15, len(_PLANE_15))))
    return (character for character in _ORDER if not any(character in text for text in avoid))
