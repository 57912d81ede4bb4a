"""One forward pass, as the attention layers see it: where new keys go, and which keys each query reads.

A model's attention layer calls `TreeStep.attend` with its packed queries, keys and values. All keys of the layer are
written before any attention runs, so a step may hold whole chains of segments.

Shapes: `T` packed tokens, `H` query heads, `Hkv` key heads, `D` head width, `B` generating rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attention.blocks import StepBlocks
from attention.kv_cache import KVCache, NodeKV, Tail, TailArena
from attention.tree import Node


@dataclass(frozen=True, slots=True)
class TailBatch:
    """All generating rows of one arena: slot `b` belongs to the query at packed index `query_index[b]`."""

    arena: TailArena
    query_index: Tensor  # [B] int64
    positions: Tensor  # [B] int64, where the new token goes
    max_length: int  # longest tail, the new token included
    is_ragged: bool  # tails differ in length

    @property
    def lengths(self) -> Tensor:
        return self.positions + 1

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value: `[Hkv, T, D]` of the whole step; only the rows' own tokens are kept."""
        slots = torch.arange(len(self.query_index), device=key.device)
        for which, new in ((0, key), (1, value)):
            self.arena.tensor[layer, which][slots, :, self.positions] = new[:, self.query_index].transpose(0, 1)

    def keys(self, layer: int) -> Tensor:
        """`[B, Hkv, max_length, D]`"""
        return self.arena.tensor[layer, 0, : len(self.query_index), :, : self.max_length]

    def values(self, layer: int) -> Tensor:
        return self.arena.tensor[layer, 1, : len(self.query_index), :, : self.max_length]


class Backend(Protocol):
    """Executes the blocks of a step for one layer."""

    def attend(self, step: "TreeStep", layer: int, query: Tensor, scale: float) -> Tensor:
        """query `[H, T, D]` -> `[T, H, D]`. All keys of the layer are in place."""
        ...


@dataclass(frozen=True, slots=True)
class TreeStep:
    """Blocks, the memory they refer to, and the backend that runs them."""

    blocks: StepBlocks
    tails: tuple[TailBatch, ...]
    num_kv_heads: int
    backend: Backend

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query `[1, H, T, D]`, key and value `[1, Hkv, T, D]` -> `[1, T, H, D]`."""
        self._write(layer, key[0], value[0])
        return self.backend.attend(self, layer, query[0], scale).unsqueeze(0)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> None:
        for block in self.blocks.self_blocks:
            kv_of(block.node).write(layer, key[:, block.start : block.stop], value[:, block.start : block.stop])
        for batch in self.tails:
            batch.write(layer, key, value)


def kv_of(node: Node) -> NodeKV:
    """The node's memory. Raises ValueError if it was never allocated."""
    if not isinstance(node.kv, NodeKV):
        raise ValueError(f"a node of {len(node)} tokens at position {node.start} has no KV memory")
    return node.kv


def tail_batches(cache: KVCache, tails: Sequence[Tail], decode_index: Sequence[int]) -> tuple[TailBatch, ...]:
    """One batch an arena. `tails[i]` belongs to the query at `decode_index[i]`; all tails of the cache are given."""
    index_of = {id(tail): index for tail, index in zip(tails, decode_index, strict=True)}
    batches = []
    for arena in cache.arenas.values():
        query_index = torch.tensor([index_of[id(tail)] for tail in arena.tails], device=arena.tensor.device)
        lengths = [tail.length for tail in arena.tails]
        positions = torch.tensor(lengths, device=arena.tensor.device)
        batches.append(TailBatch(arena, query_index, positions, max(lengths) + 1, min(lengths) != max(lengths)))
    return tuple(batches)
