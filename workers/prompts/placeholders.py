"""Text with `{column}` placeholders: the smallest template language that a job file needs.

Knows text and names of columns. There is no attribute access, no indexing and no format specification, so a
placeholder can give nothing but the column's own text. Does not know rows, messages or tokens.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_COLUMN_NAME = re.compile(r"\w[\w \-]*")


@dataclass(frozen=True, slots=True)
class Placeholder:
    """Stands for the text of one column."""

    column: str


def parse_placeholders(text: str) -> tuple[str | Placeholder, ...]:
    """Literal text and placeholders, in order; `{{` and `}}` are literal braces.

    Raises ValueError for a lone brace and for anything but a plain column name between braces.
    """
    pieces: list[str | Placeholder] = []
    position = 0
    for match in _BRACES.finditer(text):
        pieces.append(text[position : match.start()])
        pieces.append(_piece_of(match, text))
        position = match.end()
    pieces.append(text[position:])
    return tuple(piece for piece in pieces if piece != "")


def columns_in(text: str) -> frozenset[str]:
    """The columns that `text` names. Raises ValueError as `parse_placeholders` does."""
    return frozenset(piece.column for piece in parse_placeholders(text) if isinstance(piece, Placeholder))


def fill_parts(text: str, values: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """The pieces of `fill`, each with whether the author wrote it."""
    for piece in parse_placeholders(text):
        if isinstance(piece, Placeholder):
            yield values[piece.column], False
        else:
            yield piece, True


def fill(text: str, values: Mapping[str, str]) -> str:
    """`text` with each placeholder replaced by its column's value. Placeholders in values are plain text."""
    return "".join(piece for piece, _ in fill_parts(text, values))


def _piece_of(match: re.Match[str], text: str) -> str | Placeholder:
    if match.group() in ("{{", "}}"):
        return match.group()[0]
    name = match.group(1)
    if name is None:
        line = text.count("\n", 0, match.start()) + 1
        raise ValueError(
            f"lone {match.group()!r} on line {line} of a prompt template; write it twice for a literal brace"
        )
    if not _COLUMN_NAME.fullmatch(name):
        raise ValueError(
            f"placeholder {match.group()!r} is not a plain column name: want {{name}} without dots, brackets, "
            "conversions or format specifications; rename the column, or write {{ and }} for literal braces"
        )
    return Placeholder(name)
