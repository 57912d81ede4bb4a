"""Lines for a person's terminal. Text of rows may hold control sequences, so it is always shown escaped."""

from rich.console import Console
from rich.markup import escape

MAX_CELL_CHARS = 160


def console() -> Console:
    """Writes to stdout. Numbers have no colours, and long lines are not broken."""
    return Console(highlight=False, soft_wrap=True)


def plain(text: str) -> str:
    """At most MAX_CELL_CHARS characters in one line, without control characters or markup."""
    line = "".join(char if char.isprintable() else " " for char in text).strip()
    return escape(line if len(line) <= MAX_CELL_CHARS else f"{line[: MAX_CELL_CHARS - 3]}...")
