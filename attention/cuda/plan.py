"""What a variable-length kernel is told of a step: its sequences, where new keys go, and which parts a token has.

Long blocks are cut, so that the kernel is busy whatever their shape: a sequence has at most QUERY_TILE queries, since
the grid is as high as the longest one, and at most KEY_TILE keys, so that many processors read a long shared node at
once. Queries do not influence each other, and keys are cut by a node's length alone, so the batch changes no sum.

Where a sliding window hides some keys of a node from some queries, the block is cut once more
(`attention/cuda/clipped.py`). Numbers only; no kernel.

Shapes: `T` packed tokens, `N` sequences, `Q` their queries (a token occurs once for each block that it is in), `M` most
parts of a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from segue.attention.cuda.clipped import Rectangle, clipped
from segue.attention.memory.budget import Tail
from segue.attention.memory.pool import Extent, ranges
from segue.attention.tree.blocks import StepBlocks
from segue.attention.tree.node import Node

QUERY_TILE = 128  # tokens; a kernel's block has as many queries
KEY_TILE = 2048


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences of one call, on the host. int32 as kernels want them, but for what indexes tensors."""

    queries: np.ndarray  # [Q] int64: packed positions
    cu_seq_q: np.ndarray  # [N + 1]
    starts_k: np.ndarray  # [N + 1]: places in the pool; the last has no meaning
    seqused_k: np.ndarray  # [N]
    max_q: int
    max_k: int

    @classmethod
    def of(cls, blocks: np.ndarray) -> "Sequences":
        """blocks `[N, 4]`: first query, number of queries, first key, number of keys."""
        first_q, num_q, first_k, num_k = blocks.T
        cu_seq_q = np.zeros(len(blocks) + 1, dtype=np.int32)
        np.cumsum(num_q, out=cu_seq_q[1:])
        starts = np.append(first_k, first_k[-1:] + num_k[-1:]).astype(np.int32)
        longest = (int(num_q.max(initial=0)), int(num_k.max(initial=0)))
        return cls(ranges(first_q, num_q), cu_seq_q, starts, num_k.astype(np.int32), *longest)


@dataclass(frozen=True, slots=True)
class CudaPlan:
    """Parts are numbered in order: those of each call, dense, causal, leaving, and a last number for no part."""

    slots: np.ndarray  # [T] int64: the place in the pool of each token's key and value
    dense: Sequences  # blocks that are not causal
    causal: Sequences  # causal squares
    leaving: Sequences  # squares in which query `i` sees the keys from number `i` on: a window leaves the others behind
    parts: np.ndarray  # [T, M] int64
    window: int | None = None  # of the causal squares

    @property
    def num_tokens(self) -> int:
        return len(self.slots)

    @classmethod
    def of(cls, blocks: StepBlocks, tails: Sequence[Tail], window: int | None = None) -> "CudaPlan":
        """`tails[i]` is that of the query at `blocks.decode_index[i]`."""
        own = [(block, _extent(block.node)) for block in blocks.self_blocks]
        squares = [(block.start, len(block.node), extent.start) for block, extent in own if block.is_causal]
        others = [(b.start, len(b.node), extent.start, len(b.node)) for b, extent in own if not b.is_causal]
        clipped_others, leaving_squares = clipped(blocks, _earlier(blocks, tails), window, QUERY_TILE)
        dense = Sequences.of(_tiled(_array([*others, *clipped_others], 4)))
        causal = Sequences.of(_tiled_causal(_array(squares, 3)))
        leaving = Sequences.of(_array(leaving_squares, 4))
        slots = _slots(blocks, [(block.start, extent) for block, extent in own], tails)
        queries = np.concatenate([dense.queries, causal.queries, leaving.queries])
        return cls(slots, dense, causal, leaving, _parts_of(queries, len(slots)), window)


def _earlier(blocks: StepBlocks, tails: Sequence[Tail]) -> Iterator[Rectangle]:
    """Queries over keys that stand before them, or are their own."""
    for block in blocks.cross_blocks:
        extent = _extent(block.node)
        yield Rectangle(block.start, block.stop, extent.start, extent.length, block.node.start)
    for index, tail in zip(blocks.decode_index, tails, strict=True):
        first = blocks.position_ids[index] - tail.length
        yield Rectangle(index, index + 1, tail.start, tail.length + 1, first)


def _slots(blocks: StepBlocks, own: Sequence[tuple[int, Extent]], tails: Sequence[Tail]) -> np.ndarray:
    """`[T]`: where each token's key and value go."""
    slots = np.empty(blocks.num_tokens, dtype=np.int64)
    for start, extent in own:
        slots[start : start + extent.length] = np.arange(extent.start, extent.start + extent.length)
    slots[list(blocks.decode_index)] = [tail.start + tail.length for tail in tails]
    return slots


def _tiled(blocks: np.ndarray) -> np.ndarray:
    """`[N, 4]`, cut to at most QUERY_TILE queries and KEY_TILE keys each, query tiles in order."""
    return _cut(_cut(blocks, 0, QUERY_TILE), 2, KEY_TILE)


def _cut(blocks: np.ndarray, column: int, size: int) -> np.ndarray:
    """Each block as pieces of at most `size` in (first, number) at `column`."""
    counts = -(-blocks[:, column + 1] // size)
    pieces = np.repeat(blocks, counts, axis=0)
    offsets = ranges(np.zeros(len(blocks), dtype=np.int64), counts) * size
    pieces[:, column] += offsets
    pieces[:, column + 1] = np.minimum(pieces[:, column + 1] - offsets, size)
    return pieces


def _tiled_causal(squares: np.ndarray) -> np.ndarray:
    """squares `[N, 3]`: first query, number, first key -> `[N, 4]`: queries in tiles, each over all keys up to its end.

    A kernel aligns them at the bottom right: the last query sees all of these keys.
    """
    first_q, number, first_k = squares.T
    tiles = _cut(np.stack([first_q, number], axis=1), 0, QUERY_TILE)
    counts = -(-number // QUERY_TILE)
    ends = tiles[:, 0] + tiles[:, 1] - np.repeat(first_q, counts)
    return np.column_stack([tiles, np.repeat(first_k, counts), ends])


def _parts_of(queries: np.ndarray, num_tokens: int) -> np.ndarray:
    """`[T, M]`: for each token the places where it is among `queries`, filled up with `len(queries)`."""
    order = np.argsort(queries, kind="stable")
    tokens = queries[order]
    first = np.searchsorted(tokens, np.arange(num_tokens))
    rank = np.arange(len(tokens)) - first[tokens]
    parts = np.full((num_tokens, int(rank.max(initial=0)) + 1), len(queries), dtype=np.int64)
    parts[tokens, rank] = order
    return parts


def _array(rows: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, width)


def _extent(node: Node) -> Extent:
    if not isinstance(node.kv, Extent):
        raise ValueError(f"a node of {len(node)} tokens at position {node.start} has no KV memory")
    return node.kv
