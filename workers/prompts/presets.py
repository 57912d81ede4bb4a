"""Prompts that are not chats: plain text, and the two formats that the MAS authors' adapters were trained on.

The wording of `alpaca` is Stanford Alpaca's. That of `commonsense`, with its indentation and its spaces at the ends of
lines, is LLM-Adapters' (Hu et al., arXiv 2304.01933). Borders follow the format, not the text: `###` in a row's own
text is text. Does not know tokenizers or rows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from segue.workers.prompts.chat import Border, SegmentedText
from segue.workers.prompts.tokenizer import Piece

_TASK = "Below is an instruction that describes a task"
_CONTEXT = ", paired with an input that provides further context"
_WANTED = ". Write a response that appropriately completes the request."
_INDENT = " " * 16


@dataclass(frozen=True, slots=True)
class Author:
    """Text that the job's author or a preset wrote, or trusts. Control tokens in it are control tokens."""

    text: str
    is_trusted: bool = False  # a row supplied it


@dataclass(frozen=True, slots=True)
class Row:
    """Text that a row supplied. Control tokens in it are text."""

    text: str


Block = tuple[bool, tuple[Author | Row, ...]]  # (bidirectional, its text)


def text_blocks(parts: Iterable[Author | Row]) -> tuple[Block, ...]:
    """One causal segment."""
    return ((False, tuple(parts)),)


def alpaca_blocks(instruction: str, extra: str) -> tuple[Block, ...]:
    """One bidirectional segment, then `### Response:`, which is causal. `extra` is the input, "" for none."""
    header = f"{_TASK}{_CONTEXT if extra else ''}{_WANTED}\n\n### Instruction:\n"
    question: tuple[Author | Row, ...] = (Author(header), Row(instruction), Author("\n\n"))
    if extra:
        question += (Author("### Input:\n"), Row(extra), Author("\n\n"))
    return ((True, question), (False, (Author("### Response:"),)))


def commonsense_blocks(instruction: str, extra: str) -> tuple[Block, ...]:
    """Bidirectional segments that each end after a ` ###`. What follows the last one is causal. `extra` as above."""
    header = f"{_TASK}{_CONTEXT}{_WANTED} \n\n" if extra else f"{_TASK}{_WANTED}  \n\n"
    blocks: list[Block] = [(True, (Author(f"{header}{_INDENT}###"),))]
    blocks.append((True, _section("Instruction", instruction)))
    if extra:
        blocks.append((True, _section("Input", extra)))
    return (*blocks, (False, (Author(f" Response:\n{_INDENT}"),)))


def segmented(blocks: Iterable[Block], split: Callable[[str], list[Piece]]) -> SegmentedText:
    """The blocks as text with borders. `split` finds the control tokens in an author's text."""
    pieces: list[Piece] = []
    borders: list[Border] = []
    length = 0
    for bidirectional, parts in blocks:
        borders.append(Border(length, bidirectional))
        for part in parts:
            pieces += split(part.text) if isinstance(part, Author) else [Piece(part.text)]
            length += len(part.text)
    return SegmentedText(tuple(_joined_runs(pieces)), tuple(borders))


def _section(title: str, text: str) -> tuple[Author | Row, ...]:
    return (Author(f" {title}:\n{_INDENT}"), Row(text), Author(f"\n{_INDENT}\n{_INDENT}###"))


def _joined_runs(pieces: Iterable[Piece]) -> Iterable[Piece]:
    """Joins neighbouring runs of text: a word may be written by both author and row."""
    run: list[str] = []
    for piece in pieces:
        if piece.control_id is None:
            run.append(piece.text)
            continue
        yield from (Piece(text) for text in ["".join(run)] if text)
        run.clear()
        yield piece
    yield from (Piece(text) for text in ["".join(run)] if text)
