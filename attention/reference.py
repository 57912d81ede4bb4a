"""The specification: attention with a dense mask, in the obvious way. Slow on purpose; every backend is held to it."""

from functools import partial

import torch
from torch import Tensor

from attention.step import TreeStep, kv_of
from attention.tree import Node
from attention.visibility import block_sequence_ids, visible


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query `[H, Q, D]`, key and value `[Hkv, K, D]`, mask bool `[Q, K]` -> `[Q, H, D]`, computed in fp64."""
    groups = query.shape[0] // key.shape[0]
    key = key.double().repeat_interleave(groups, dim=0)
    value = value.double().repeat_interleave(groups, dim=0)
    scores = query.double() @ key.transpose(-1, -2) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)


class ReferenceBackend:
    """One chain at a time: gathers the chain's keys and builds the mask from the rule."""

    def plan(self, step: TreeStep) -> dict[Node, slice]:
        """Where the step's own nodes lie in its packed tokens."""
        return {block.node: slice(block.start, block.stop) for block in step.blocks.self_blocks}

    def attend(self, step: TreeStep, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query `[H, T, D]`, key and value `[Hkv, T, D]` -> `[T, H, D]`."""
        out = torch.empty(query.shape[1], query.shape[0], query.shape[2], dtype=query.dtype)
        gather = partial(_chain, layer=layer, new=step.plan, key=key, value=value)
        for block in step.blocks.self_blocks:
            keys, values = gather(block.node)
            mask = visible(block_sequence_ids(block.node.segments()))[block.node.start :]
            out[block.start : block.stop] = dense_attention(
                query[:, block.start : block.stop], keys, values, mask, scale
            )
        ends = _decode_ends(step)
        for batch in step.tails:
            for slot, index in enumerate(batch.query_index.tolist()):
                keys, values = gather(ends[index])
                length = int(batch.lengths[slot])
                keys = torch.cat([keys, batch.keys(layer)[slot, :, :length]], dim=1)
                values = torch.cat([values, batch.values(layer)[slot, :, :length]], dim=1)
                mask = torch.ones(1, keys.shape[1], dtype=torch.bool)
                out[index] = dense_attention(query[:, index : index + 1], keys, values, mask, scale)[0]
        return out


def _chain(end: Node, *, layer: int, new: dict[Node, slice], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[Hkv, end.stop, D]` of the whole prompt that ends at `end`; `new` nodes are in this step's."""
    path = end.path()
    keys = [key[:, new[node]] if node in new else kv_of(node).keys(layer) for node in path]
    values = [value[:, new[node]] if node in new else kv_of(node).values(layer) for node in path]
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


def _decode_ends(step: TreeStep) -> dict[int, Node]:
    """The node each decode query hangs below: the deepest cross block that covers it."""
    deepest: dict[int, tuple[int, Node]] = {}
    for block in step.blocks.cross_blocks:
        for index in step.blocks.decode_index:
            if block.start <= index < block.stop and block.level >= deepest.get(index, (-1, block.node))[0]:
                deepest[index] = (block.level, block.node)
    return {index: node for index, (_, node) in deepest.items()}
