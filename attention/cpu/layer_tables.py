"""What the compiled kernel is told of a step, for layers of one kind: those with the same sliding window.

A *run* is queries that see the same keys, which are the tokens of a new node or the one token of a generating row. Its
*spans* are the keys that it still has to see, and its *parts* the results of large blocks. A window clips spans: it
moves the first key that a run sees, and by one more key for each further query. Large blocks that it clips stay spans.
Knows blocks and memory; no queries.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from segue.attention.cpu.kernels import ALL_SEEN, SPAN_FIELDS, Tables
from segue.attention.cpu.node_pieces import piece_of
from segue.attention.memory.pieces import Piece
from segue.attention.tree.blocks import CrossBlock, SelfBlock, StepBlocks

SHORT_RUN = 32  # queries

Block = SelfBlock | CrossBlock
Tails = Mapping[int, Sequence[tuple[Piece, int]]]  # by packed index of a decode query: pieces, how much of each is used


@dataclass(frozen=True, slots=True)
class LayerTables:
    """The kernel's tables, and the blocks of which torch must compute the parts in each layer."""

    tables: Tables
    flash_blocks: Sequence[Block]


def layer_tables(
    blocks: StepBlocks, tails: Tails, window: int | None, *, by_tiles: bool, few_pairs: int
) -> LayerTables:
    """`by_tiles`: the kernel computes large blocks, too. `few_pairs`: blocks up to this size are not large."""
    candidates = _of_short_runs(blocks) if by_tiles else (*blocks.self_blocks, *blocks.cross_blocks)
    large = [b for b in candidates if _num_pairs(b) > few_pairs and not _is_clipped(b, blocks.position_ids, window)]
    tables = Tables(by_tiles=by_tiles)
    _Writer(tables, blocks, tails, window).write(large)
    return LayerTables(tables, () if by_tiles else large)


class _Writer:
    """Fills tables."""

    def __init__(self, tables: Tables, blocks: StepBlocks, tails: Tails, window: int | None) -> None:
        self._tables = tables
        self._blocks = blocks
        self._tails = tails
        self._window = window
        self._own_start = {block.node: block.start for block in blocks.self_blocks}

    def write(self, large: Sequence[Block]) -> None:
        self._write_kept()
        number_of = {id(block): number for number, block in enumerate(large)}
        for start, stop, seen in _runs(self._blocks):
            self._write_run(start, stop, seen, number_of)
        for block in large if self._tables.by_tiles else ():
            self._tables.blocks.extend((block.start, block.stop, *self._keys(block), ALL_SEEN))

    def _write_kept(self) -> None:
        for own in self._blocks.self_blocks:
            self._tables.kept.extend((*piece_of(own.node).place(), own.start, own.stop))
        for index, pieces in self._tails.items():
            last, used = pieces[-1]
            self._tables.kept.extend((*last.place(used - 1), index, index + 1))

    def _write_run(self, start: int, stop: int, seen: Sequence[Block], number_of: Mapping[int, int]) -> None:
        tables, position = self._tables, self._blocks.position_ids[start]
        first = len(tables.spans) // SPAN_FIELDS, len(tables.indices)
        for block in seen:
            if id(block) in number_of:
                tables.indices.append(number_of[id(block)])
            elif isinstance(block, SelfBlock) and not block.is_causal:  # a window does not hide the query's own segment
                tables.spans.extend((*self._keys(block), ALL_SEEN))
            else:
                first_seen = self._first_seen(position, block.node.start)
                if first_seen < len(block.node):
                    tables.spans.extend((*self._keys(block), first_seen))
        self._write_tail(start, position)
        end = len(tables.spans) // SPAN_FIELDS, len(tables.indices)
        tables.runs.extend((start, stop, first[0], end[0], first[1], end[1]))

    def _write_tail(self, index: int, position: int) -> None:
        pieces = self._tails.get(index, ())
        key = position + 1 - sum(used for _, used in pieces)
        for piece, used in pieces:
            first_seen = self._first_seen(position, key)
            if first_seen < used:
                self._tables.spans.extend((*piece.place(), 0, used, False, first_seen))
            key += used

    def _first_seen(self, position: int, key: int) -> int:
        """Of keys from position `key` on, the number of the first one that a query at `position` sees."""
        return ALL_SEEN if self._window is None else position - self._window + 1 - key

    def _keys(self, block: Block) -> tuple[int, ...]:
        """A C++ Span without its `first_seen`."""
        if block.node not in self._own_start:
            return (*piece_of(block.node).place(), 0, len(block.node), False)
        is_causal = isinstance(block, SelfBlock) and block.is_causal
        return (0, 0, 0, 0, 0, self._own_start[block.node], len(block.node), is_causal)


def _is_clipped(block: Block, position_ids: Sequence[int], window: int | None) -> bool:
    """Whether the window hides a key of the block from one of its queries."""
    if window is None:
        return False
    if isinstance(block, SelfBlock):
        return block.is_causal and len(block.node) > window
    return max(position_ids[block.start : block.stop]) - block.node.start >= window


def _of_short_runs(blocks: StepBlocks) -> Iterator[CrossBlock]:
    """The blocks seen by many runs, each with too few queries to fill the rows that tiles multiply at once."""
    starts = sorted([*(block.start for block in blocks.self_blocks), *blocks.decode_index])
    for block in blocks.cross_blocks:
        num_runs = bisect_left(starts, block.stop) - bisect_left(starts, block.start)
        if num_runs > 1 and block.stop - block.start < SHORT_RUN * num_runs:
            yield block


def _num_pairs(block: Block) -> int:
    """Of a query and a key that it sees."""
    pairs = (block.stop - block.start) * len(block.node)
    return pairs // 2 if isinstance(block, SelfBlock) and block.is_causal else pairs


def _runs(blocks: StepBlocks) -> Iterator[tuple[int, int, list[Block]]]:
    """Queries `[start, stop)` with the same keys, in order, and their blocks, without tails."""
    below = sorted(blocks.cross_blocks, key=lambda block: (block.start, block.level))
    own: list[tuple[int, int, list[Block]]] = [(block.start, block.stop, [block]) for block in blocks.self_blocks]
    own += [(index, index + 1, []) for index in blocks.decode_index]
    above: list[Block] = []
    num_begun = 0
    for start, stop, self_blocks in sorted(own, key=lambda run: run[0]):
        while above and above[-1].stop <= start:
            above.pop()
        while num_begun < len(below) and below[num_begun].start <= start:
            above.append(below[num_begun])
            num_begun += 1
        yield start, stop, [*above, *self_blocks]
