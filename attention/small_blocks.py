"""Blocks of a step's small nodes as few padded batches: at these sizes a call costs more than what it computes.

Only blocks whose keys were made in the same step are batched, since those lie packed side by side. A causal square is
padded at its end, where causal attention never looks; a rectangle's padded keys are hidden by an additive bias. Every
query of a rectangle has at least one key. Made once a step, used by every layer. Knows positions; no heads, no kernel.

Shapes: `B` blocks of a batch, `Q` queries and `K` keys of its largest block, `V` queries without the padding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.blocks import CrossBlock, SelfBlock, StepBlocks
from attention.step import SMALL_TOKENS
from attention.tree import Node

Range = tuple[int, int]  # packed positions [start, stop)


@dataclass(frozen=True, slots=True)
class SquareBatch:
    """Small nodes over their own keys, causally."""

    tokens: Tensor  # [B, Q] packed positions, each row padded with its last one
    is_token: Tensor  # [V] where in the flattened [B * Q] there is no padding
    index: Tensor  # [V] packed positions of these


@dataclass(frozen=True, slots=True)
class RectangleBatch:
    """Queries over all keys of a small node."""

    queries: Tensor  # [B, Q]
    is_query: Tensor  # [V]
    index: Tensor  # [V]
    keys: Tensor  # [B, K]
    is_padding: Tensor | None  # [B, K] bool; None where all keys are real


@dataclass(frozen=True, slots=True)
class SmallBlocks:
    """A step's small blocks, batched, and the blocks that are none."""

    single: Tensor  # [V] tokens that are nodes of their own: each sees itself
    squares: tuple[SquareBatch, ...]
    own: tuple[RectangleBatch, ...]  # bidirectional nodes over themselves
    above: tuple[RectangleBatch, ...]  # queries below small nodes of this step; disjoint within a batch
    large_self: tuple[SelfBlock, ...]
    large_cross: tuple[CrossBlock, ...]  # by level
    place: dict[Node, slice]  # where this step's own nodes lie in its packed tokens


def small_blocks(blocks: StepBlocks) -> SmallBlocks:
    """Sort a step's blocks into batches."""
    place = {block.node: (block.start, block.stop) for block in blocks.self_blocks if len(block.node) <= SMALL_TOKENS}
    small = [block for block in blocks.self_blocks if block.node in place]
    longer = [block for block in small if block.stop - block.start > 1]
    crossing = [b for b in blocks.cross_blocks if b.node in place and b.stop - b.start <= SMALL_TOKENS]
    levels: dict[int, list[tuple[Range, Range]]] = {}
    for block in crossing:
        levels.setdefault(block.level, []).append(((block.start, block.stop), place[block.node]))
    batched = set(crossing)
    return SmallBlocks(
        single=torch.tensor([block.start for block in small if block.stop - block.start == 1], dtype=torch.long),
        squares=tuple(_squares([(block.start, block.stop) for block in longer if block.is_causal])),
        own=tuple(_rectangles([((b.start, b.stop), (b.start, b.stop)) for b in longer if not b.is_causal])),
        above=tuple(batch for pairs in levels.values() for batch in _rectangles(pairs)),
        large_self=tuple(block for block in blocks.self_blocks if block.node not in place),
        large_cross=tuple(block for block in blocks.cross_blocks if block not in batched),
        place={block.node: slice(block.start, block.stop) for block in blocks.self_blocks},
    )


def _squares(ranges: Sequence[Range]) -> Iterable[SquareBatch]:
    for group in _grouped(ranges, lambda tokens: (_bucket(tokens),)):
        yield SquareBatch(*_padded(group))


def _rectangles(pairs: Sequence[tuple[Range, Range]]) -> Iterable[RectangleBatch]:
    for group in _grouped(pairs, lambda pair: (_bucket(pair[0]), _bucket(pair[1]))):
        keys, is_key, _ = _padded([pair[1] for pair in group])
        is_padding = torch.ones(keys.numel(), dtype=torch.bool).index_fill_(0, is_key, False).view(keys.shape)
        yield RectangleBatch(*_padded([pair[0] for pair in group]), keys, is_padding if is_padding.any() else None)


def _grouped(items, key_of):
    groups: dict[tuple[int, ...], list] = {}
    for item in items:
        groups.setdefault(key_of(item), []).append(item)
    return groups.values()


def _bucket(tokens: Range) -> int:
    """Blocks within a factor of two of each other share a batch."""
    return (tokens[1] - tokens[0] - 1).bit_length()


def _padded(ranges: Sequence[Range]) -> tuple[Tensor, Tensor, Tensor]:
    """(packed positions `[B, N]`, flat places of real ones `[V]`, packed positions of real ones `[V]`)"""
    starts = torch.tensor([start for start, _ in ranges])
    lengths = torch.tensor([stop - start for start, stop in ranges])
    offsets = torch.arange(int(lengths.max()))
    positions = starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
    is_real = (offsets < lengths[:, None]).flatten().nonzero()[:, 0]
    return positions, is_real, positions.flatten()[is_real]
