"""A step's way into memory made of nodes and arenas: where new keys go, and which tails its generating rows have.

Shapes: `T` packed tokens, `Hkv` key heads, `D` head width, `B` generating rows, `S` tokens of small nodes, `L` layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segue.attention.cpu.kv_cache import KVCache, NodeKV, TailArena
from segue.attention.memory.budget import KVMemory, KVShape, Tail
from segue.attention.tree.blocks import SelfBlock, StepBlocks
from segue.attention.tree.tree import Node

SMALL_TOKENS = 64  # up to here nodes are handled many at a time: calls, not numbers, are what they cost


@dataclass(frozen=True, slots=True)
class TailBatch:
    """All generating rows of one arena: slot `b` belongs to the `b`-th of the packed tokens at `rows`."""

    arena: TailArena
    rows: slice | Tensor  # B of them; a slice if they stand side by side, else [B] int64
    slots: Tensor  # [B] int64: 0, 1, ...
    positions: Tensor  # [B] int64, where the new token goes
    max_length: int  # longest tail, the new token included
    is_ragged: bool  # tails differ in length

    @property
    def lengths(self) -> Tensor:
        return self.positions + 1

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value: `[Hkv, T, D]` of the whole step; only the rows' own tokens are kept."""
        for which, new in ((0, key), (1, value)):
            self.arena.tensor[layer, which][self.slots, :, self.positions] = new[:, self.rows].transpose(0, 1)

    def keys(self, layer: int) -> Tensor:
        """`[B, Hkv, max_length, D]`"""
        return self.arena.tensor[layer, 0, : len(self.slots), :, : self.max_length]

    def values(self, layer: int) -> Tensor:
        return self.arena.tensor[layer, 1, : len(self.slots), :, : self.max_length]


class StepMemory:
    """Writes a step's keys and values to the nodes and tails they belong to."""

    def __init__(self, blocks: StepBlocks, tails: Sequence[Tail], memory: KVMemory) -> None:
        if not isinstance(memory, KVCache):
            raise TypeError(f"wanted memory of nodes and arenas, got {type(memory).__name__}")
        own = blocks.self_blocks
        self.tails = _tail_batches(memory, tails, blocks.decode_index)
        self._large = tuple(block for block in own if len(block.node) > SMALL_TOKENS)
        self._staged = _StagedKV([block for block in own if len(block.node) <= SMALL_TOKENS], memory.shape)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value: `[Hkv, T, D]` of the whole step."""
        for block in self._large:
            kv_of(block.node).write(layer, key[:, block.start : block.stop], value[:, block.start : block.stop])
        self._staged.write(layer, key, value)
        for batch in self.tails:
            batch.write(layer, key, value)

    def finish(self) -> None:
        self._staged.store()


class _StagedKV:
    """Keys and values of a step's small nodes side by side: one write a layer, and one copy a node when all are in.

    Beside the budget, like activations: at most as many tokens as a step has in small nodes.
    """

    def __init__(self, blocks: Sequence[SelfBlock], shape: KVShape) -> None:
        self._blocks = blocks
        index = [position for block in blocks for position in range(block.start, block.stop)]
        self._index = torch.tensor(index, device=shape.device)  # [S] packed positions
        size = (shape.num_layers, 2, shape.num_kv_heads, len(index), shape.head_dim)
        self._tensor = torch.empty(size, dtype=shape.dtype, device=shape.device)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        if len(self._index):
            torch.index_select(key, 1, self._index, out=self._tensor[layer, 0])
            torch.index_select(value, 1, self._index, out=self._tensor[layer, 1])

    def store(self) -> None:
        """Give each node its own."""
        start = 0
        for block in self._blocks:
            stop = start + block.stop - block.start
            kv_of(block.node).tensor.copy_(self._tensor[:, :, :, start:stop])
            start = stop


def kv_of(node: Node) -> NodeKV:
    """The node's memory. Raises ValueError if it was never allocated."""
    if not isinstance(node.kv, NodeKV):
        raise ValueError(f"a node of {len(node)} tokens at position {node.start} has no KV memory")
    return node.kv


def _tail_batches(memory: KVCache, tails: Sequence[Tail], decode_index: Sequence[int]) -> tuple[TailBatch, ...]:
    """One batch an arena. `tails[i]` belongs to the query at `decode_index[i]`; all tails of the memory are given."""
    index_of = {id(tail): index for tail, index in zip(tails, decode_index, strict=True)}
    batches = []
    for arena in memory.arenas.values():
        device = arena.tensor.device
        indices = [index_of[id(tail)] for tail in arena.tails]
        run = range(indices[0], indices[0] + len(indices))
        rows = slice(run.start, run.stop) if indices == list(run) else torch.tensor(indices, device=device)
        lengths = [tail.length for tail in arena.tails]
        batches.append(
            TailBatch(
                arena,
                rows,
                torch.arange(len(indices), device=device),
                torch.tensor(lengths, device=device),
                max(lengths) + 1,
                min(lengths) != max(lengths),
            )
        )
    return tuple(batches)
