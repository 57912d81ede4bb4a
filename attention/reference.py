"""The specification: attention with a dense mask, in the obvious way. Slow on purpose.

Tests compare every backend with it. It imports no other backend.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from segue.attention.backend import LayerAttention
from segue.attention.memory.budget import KVMemory, KVShape, Tail
from segue.attention.memory.pieces import KVPieces, Piece
from segue.attention.tree.blocks import StepBlocks
from segue.attention.tree.node import Node
from segue.attention.visibility import block_sequence_ids, visible


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, how: LayerAttention) -> Tensor:
    """query `[H, Q, D]`, key and value `[Hkv, K, D]`, mask bool `[Q, K]` -> `[Q, H, D]`, computed in fp64.

    `mask` holds the window already.
    """
    groups = query.shape[0] // key.shape[0]
    key = key.double().repeat_interleave(groups, dim=0)
    value = value.double().repeat_interleave(groups, dim=0)
    scores = query.double() @ key.transpose(-1, -2) * how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if how.sinks is not None:
        sinks = how.sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
        value = torch.cat([value, torch.zeros_like(value[:, :1])], dim=1)
    return (scores.softmax(-1) @ value).transpose(0, 1)


class ReferenceBackend:
    """One chain at a time: gathers the chain's keys and builds the mask from the rule."""

    def new_memory(self, shape: KVShape, budget_bytes: int) -> KVPieces:
        return KVPieces(shape, budget_bytes)

    def begin(self, blocks: StepBlocks, tails: Sequence[Tail], memory: KVMemory) -> "_ReferenceStep":
        if not isinstance(memory, KVPieces):
            raise TypeError(f"wanted memory of pieces, got {type(memory).__name__}")
        return _ReferenceStep(blocks, [list(memory.pieces(tail, tail.length + 1)) for tail in tails])


class _ReferenceStep:
    """`tails`: of each decode query, the pieces with its new token and how much of each is used."""

    def __init__(self, blocks: StepBlocks, tails: Sequence[Sequence[tuple[Piece, int]]]) -> None:
        self._blocks = blocks
        self._ends = _decode_ends(blocks)
        self._tails = list(zip(blocks.decode_index, tails, strict=True))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention) -> Tensor:
        """query `[H, T, D]`, key and value `[Hkv, T, D]` -> `[T, H, D]`."""
        self._keep(layer, key, value)
        out = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        for block in self._blocks.self_blocks:
            keys, values = _joined(_chain(block.node, layer))
            mask = visible(block_sequence_ids(block.node.segments()), how.window)[block.node.start :].to(query.device)
            attended = dense_attention(query[:, block.start : block.stop], keys, values, mask, how)
            out[block.start : block.stop] = attended.to(out.dtype)
        for index, pieces in self._tails:
            generated = [piece.read(layer, used) for piece, used in pieces]
            keys, values = _joined([*_chain(self._ends[index], layer), *generated])
            mask = torch.ones(1, keys.shape[1], dtype=torch.bool, device=query.device)
            if how.window is not None:  # the query is the last token
                mask[:, : -how.window] = False
            out[index] = dense_attention(query[:, index : index + 1], keys, values, mask, how)[0].to(out.dtype)
        return out

    def finish(self) -> None:
        """All keys and values are where they stay."""

    def _keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        for block in self._blocks.self_blocks:
            _piece_of(block.node).write(layer, key[:, block.start : block.stop], value[:, block.start : block.stop])
        for index, pieces in self._tails:
            last, used = pieces[-1]
            last.write(layer, key[:, index : index + 1], value[:, index : index + 1], used - 1)


def _chain(end: Node, layer: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the whole prompt that ends at `end`, node by node."""
    return [_piece_of(node).read(layer) for node in end.path()]


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`[Hkv, n, D]` each -> `[Hkv, sum of n, D]`"""
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


def _piece_of(node: Node) -> Piece:
    if not isinstance(node.kv, Piece):
        raise ValueError(f"a node of {len(node)} tokens at position {node.start} has no KV memory")
    return node.kv


def _decode_ends(blocks: StepBlocks) -> dict[int, Node]:
    """For each decode query the node at which its prompt ends: that of the deepest cross block that covers it."""
    deepest: dict[int, tuple[int, Node]] = {}
    for block in blocks.cross_blocks:
        for index in blocks.decode_index:
            if block.start <= index < block.stop and block.level >= deepest.get(index, (-1, block.node))[0]:
                deepest[index] = (block.level, block.node)
    return {index: node for index, (_, node) in deepest.items()}
