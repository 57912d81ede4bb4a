"""Characters that stand in for others while a prompt is rendered, and marks that show where the template put text.

They come from Unicode's private use plane 15, in an order that each process draws anew, and never occur in the text
that they are used with. So a row can neither guess nor forge them. Does not know templates or tokenizers.
"""

import re
import secrets
from collections.abc import Iterable, Iterator, Sequence

from segue.workers.errors import RowError, RowErrorCode

_PLANE_15 = range(0xF0010, 0xFFFFE)
_ORDER: list[str] = []


class PrivateUse:
    """Stand-ins and marks for one row. `avoid` is all text that they will be mixed with."""

    def __init__(self, avoid: Sequence[str]) -> None:
        self._fresh = _unused(avoid)
        self._mark, self._shield, self.end = self.take(), self.take(), self.take()
        self._marks = re.compile(f"{self._mark}(\\d+){self._mark}")
        self._shielded = re.compile(f"{self._shield}(.)", re.DOTALL)
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

    def hide(self, text: str, places: Iterable[int]) -> str:
        """`text` with other characters at these places."""
        characters = list(text)
        for place in places:
            characters[place] = self._stand_in(characters[place])
        return "".join(characters)

    def shield(self, text: str, places: Iterable[int]) -> str:
        """`text` with a character put before each of these places: a template can still see what is there."""
        characters = list(text)
        for place in places:
            characters[place] = self._shield + characters[place]
        return "".join(characters)

    def hide_shielded(self, text: str) -> str:
        """What `hide` would have made of shielded text."""
        hidden = self._shielded.sub(lambda match: self._stand_in(match.group(1)), text)
        return hidden.replace(self._shield, "")

    def restore(self, text: str) -> str:
        """`text` with its own characters again, where `hide` replaced them."""
        return text.translate({ord(stand_in): character for character, stand_in in self._stand_ins.items()})

    def take(self) -> str:
        """A character that nothing else uses. Raises RowError(TEMPLATE_ERROR) if there is none left."""
        for character in self._fresh:
            return character
        raise RowError(
            RowErrorCode.TEMPLATE_ERROR, "the prompt uses up all characters of Unicode's private use plane 15"
        )

    def _stand_in(self, character: str) -> str:
        if character not in self._stand_ins:
            self._stand_ins[character] = self.take()
        return self._stand_ins[character]


def _unused(avoid: Sequence[str]) -> Iterator[str]:
    if not _ORDER:
        _ORDER.extend(map(chr, secrets.SystemRandom().sample(_PLANE_15, len(_PLANE_15))))
    return (character for character in _ORDER if not any(character in text for text in avoid))
