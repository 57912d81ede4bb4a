"""A step's small nodes as few padded batches: at these sizes a call costs more than what it computes.

The small nodes that a step computes lie packed side by side, so their keys can be gathered. Each of them has two
blocks: a square over itself, and a rectangle over its *lineage*, all small nodes right above it taken together. Padded
keys are hidden by an additive bias, and in causal squares by their place after all queries. Made once a step, used by
every layer. Knows positions; no heads, no kernel.

Shapes: `B` blocks of a batch, `Q` queries and `K` keys of its largest block, `V` queries without the padding.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segue.attention.cpu.step_memory import SMALL_TOKENS
from segue.attention.tree.blocks import CrossBlock, SelfBlock, StepBlocks
from segue.attention.tree.tree import Node

MAX_GROUP_KEYS = 1 << 14  # gathered at once, for every key head
MAX_LINEAGE_TOKENS = 256  # a longer one is cut: its keys are gathered for every node below
BATCH_SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # what blocks are padded to, at most

Range = tuple[int, int]  # packed positions [start, stop)
Block = tuple[Range, tuple[Range, ...], bool]  # queries, keys, is it a causal square


@dataclass(frozen=True, slots=True)
class SmallBatch:
    """Blocks of about equal size, padded: where their queries and keys are in what a group gathers."""

    num_blocks: int
    queries: slice  # of the group's query positions: B * Q
    keys: slice  # of the group's key positions: B * K
    is_hidden: Tensor | None  # [B, 1, K] or, in causal squares, [1, Q, K] bool; None where every key is seen


@dataclass(frozen=True, slots=True)
class SmallGroup:
    """Batches whose queries are disjoint: gathered together, and their results scattered together."""

    batches: tuple[SmallBatch, ...]
    queries: Tensor  # [sum of B * Q] packed positions, each block padded with its last one
    keys: Tensor  # [sum of B * K]
    is_query: Tensor  # [V] where in `queries` there is no padding
    index: Tensor  # [V] packed positions of these, none twice


@dataclass(frozen=True, slots=True)
class SmallBlocks:
    """A step's small blocks, batched, and the blocks that are none."""

    single: Tensor  # [V] tokens that are nodes of their own: each sees itself
    own: SmallGroup  # longer nodes over themselves
    above: tuple[SmallGroup, ...]  # small nodes over their lineages
    large_self: tuple[SelfBlock, ...]
    large_cross: tuple[CrossBlock, ...]  # by level
    place: dict[Node, slice]  # where this step's own nodes lie in its packed tokens


def small_blocks(blocks: StepBlocks) -> SmallBlocks:
    """Sort a step's blocks into batches."""
    small = {block.node: (block.start, block.stop) for block in blocks.self_blocks if len(block.node) <= SMALL_TOKENS}
    longer = [block for block in blocks.self_blocks if 1 < len(block.node) <= SMALL_TOKENS]
    singles = [start for node, (start, _) in small.items() if len(node) == 1]
    return SmallBlocks(
        single=torch.tensor(singles, dtype=torch.long),
        own=_group([(small[block.node], (small[block.node],), block.is_causal) for block in longer]),
        above=tuple(_group(part) for level in _lineages(blocks, small) for part in _bounded(level)),
        large_self=tuple(block for block in blocks.self_blocks if block.node not in small),
        large_cross=tuple(block for block in blocks.cross_blocks if block.node not in small),
        place={block.node: slice(block.start, block.stop) for block in blocks.self_blocks},
    )


def _lineages(blocks: StepBlocks, small: Collection[Node]) -> list[list[Block]]:
    """For each node its queries over its lineage; lists of blocks whose queries are disjoint.

    A lineage is closed above a large node, and where it would become too long: whatever is below attends to it as a
    whole, and a new one begins.
    """
    below = {block.node: block.stop for block in blocks.cross_blocks}
    # Of a node's children: the ranges of their lineage, and how many were closed above them.
    lineage: dict[Node | None, tuple[tuple[Range, ...], int]] = {}
    levels: list[list[Block]] = [[]]
    for block in blocks.self_blocks:
        node = block.node
        ranges, number = lineage.get(node.parent, ((), 0))
        is_small = node in small
        if ranges and (not is_small or sum(stop - start for start, stop in ranges) + len(node) > MAX_LINEAGE_TOKENS):
            levels += [[] for _ in range(number + 2 - len(levels))]
            levels[number] += _pieces(block.start, max(block.stop, below.get(node, 0)), ranges)
            ranges, number = (), number + 1
        elif ranges:
            levels[number].append(((block.start, block.stop), ranges, False))
        lineage[node] = ((*ranges, (block.start, block.stop)), number) if is_small else ((), number)
    return levels


def _bounded(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """In parts of at most MAX_GROUP_KEYS keys, so that what is gathered at once stays small."""
    part: list[Block] = []
    num_keys = 0
    for block in blocks:
        size = sum(stop - start for start, stop in block[1])
        if part and num_keys + size > MAX_GROUP_KEYS:
            yield part
            part, num_keys = [], 0
        part.append(block)
        num_keys += size
    if part:
        yield part


def _pieces(start: int, stop: int, keys: tuple[Range, ...]) -> Iterable[Block]:
    for piece in range(start, stop, SMALL_TOKENS):
        yield (piece, min(piece + SMALL_TOKENS, stop)), keys, False


def _group(blocks: Sequence[Block]) -> SmallGroup:
    """Blocks with disjoint queries, those of about equal size in one batch."""
    by_size: dict[object, list[Block]] = {}
    for block in blocks:
        (start, stop), seen_ranges, is_causal = block
        size = (_batch_size(stop - start), _batch_size(sum(end - begin for begin, end in seen_ranges)), is_causal)
        by_size.setdefault(size, []).append(block)
    batches: list[SmallBatch] = []
    queries: list[Tensor] = [torch.empty(0, dtype=torch.long)]
    keys: list[Tensor] = [torch.empty(0, dtype=torch.long)]
    is_query: list[Tensor] = [torch.empty(0, dtype=torch.bool)]
    num_queries = num_keys = 0
    for alike in by_size.values():
        own, is_own = _padded([(block[0],) for block in alike])
        seen, is_key = _padded([block[1] for block in alike])
        is_hidden = _triangle(own.shape[1]) if alike[0][2] else None if is_key.all() else ~is_key[:, None]
        places = slice(num_queries, num_queries + own.numel()), slice(num_keys, num_keys + seen.numel())
        batches.append(SmallBatch(len(alike), *places, is_hidden))
        queries.append(own.flatten())
        keys.append(seen.flatten())
        is_query.append(is_own.flatten())
        num_queries, num_keys = places[0].stop, places[1].stop
    positions, real = torch.cat(queries), torch.cat(is_query).nonzero()[:, 0]
    return SmallGroup(tuple(batches), positions, torch.cat(keys), real, positions[real])


def _triangle(size: int) -> Tensor:
    """`[1, size, size]`: what comes later, padding included. At most SMALL_TOKENS wide, one for a whole batch."""
    return torch.ones(1, size, size, dtype=torch.bool).triu_(1)


def _batch_size(num_tokens: int) -> int:
    return next(size for size in BATCH_SIZES if num_tokens <= size)


def _padded(rows: Sequence[tuple[Range, ...]]) -> tuple[Tensor, Tensor]:
    """The positions of each row's ranges, padded with its last one, and which are real: `[B, N]` each."""
    positions = [[position for start, stop in row for position in range(start, stop)] for row in rows]
    width = max(map(len, positions))
    padded = torch.tensor([row + row[-1:] * (width - len(row)) for row in positions])
    return padded, torch.arange(width) < torch.tensor([len(row) for row in positions])[:, None]
