"""The specification: attention with a dense mask, in the obvious way. Slow on purpose; every backend is held to it."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from segue.attention.cpu.kv_cache import KVCache
from segue.attention.cpu.step_memory import StepMemory, kv_of
from segue.attention.memory.budget import KVMemory, KVShape, Tail
from segue.attention.tree.blocks import StepBlocks
from segue.attention.tree.tree import Node
from segue.attention.visibility import block_sequence_ids, visible


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

    def new_memory(self, shape: KVShape, budget_bytes: int) -> KVCache:
        return KVCache(shape, budget_bytes)

    def begin(self, blocks: StepBlocks, tails: Sequence[Tail], memory: KVMemory) -> "_ReferenceStep":
        return _ReferenceStep(blocks, StepMemory(blocks, tails, memory))


class _ReferenceStep:
    def __init__(self, blocks: StepBlocks, memory: StepMemory) -> None:
        self.blocks = blocks
        self.memory = memory
        self._new = {block.node: slice(block.start, block.stop) for block in blocks.self_blocks}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query `[H, T, D]`, key and value `[Hkv, T, D]` -> `[T, H, D]`."""
        self.memory.write(layer, key, value)
        out = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        gather = partial(_chain, layer=layer, new=self._new, key=key, value=value)
        for block in self.blocks.self_blocks:
            keys, values = gather(block.node)
            mask = visible(block_sequence_ids(block.node.segments()))[block.node.start :].to(query.device)
            attended = dense_attention(query[:, block.start : block.stop], keys, values, mask, scale)
            out[block.start : block.stop] = attended.to(out.dtype)
        ends = _decode_ends(self.blocks)
        for batch in self.memory.tails:
            for slot, index in enumerate(torch.arange(query.shape[1])[batch.rows].tolist()):
                length = int(batch.lengths[slot])
                keys, values = batch.keys(layer)[slot, :, :length], batch.values(layer)[slot, :, :length]
                if index in ends:  # else its whole prompt is in its tail
                    above = gather(ends[index])
                    keys, values = torch.cat([above[0], keys], dim=1), torch.cat([above[1], values], dim=1)
                mask = torch.ones(1, keys.shape[1], dtype=torch.bool, device=query.device)
                attended = dense_attention(query[:, index : index + 1], keys, values, mask, scale)
                out[index] = attended[0].to(out.dtype)
        return out

    def finish(self) -> None:
        self.memory.finish()


def _chain(end: Node, *, layer: int, new: dict[Node, slice], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[Hkv, end.stop, D]` of the whole prompt that ends at `end`; `new` nodes are in this step's."""
    path = end.path()
    keys = [key[:, new[node]] if node in new else kv_of(node).keys(layer) for node in path]
    values = [value[:, new[node]] if node in new else kv_of(node).values(layer) for node in path]
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


def _decode_ends(blocks: StepBlocks) -> dict[int, Node]:
    """The node each decode query hangs below: the deepest cross block that covers it."""
    deepest: dict[int, tuple[int, Node]] = {}
    for block in blocks.cross_blocks:
        for index in blocks.decode_index:
            if block.start <= index < block.stop and block.level >= deepest.get(index, (-1, block.node))[0]:
                deepest[index] = (block.level, block.node)
    return {index: node for index, (_, node) in deepest.items()}
