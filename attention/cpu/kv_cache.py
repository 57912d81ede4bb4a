"""Keys and values where calls are dear and tokens few at a time, as on a CPU without a compiler: one tensor a tree
node, one slot of an arena a generating row, so that one attention call serves all rows of an arena.

Shapes: `L` layers, `Hkv` key heads, `T` tokens, `D` head width, `B` slots. Knows no tree and no scheduler.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from segue.attention.memory.budget import KVMemory, KVShape, Tail, next_capacity
from segue.attention.tree.node_memory import NodeMemory

MAX_COPIED_TOKENS = 256  # a longer node is worth a call of its own


class NodeKV:
    """Keys and values of consecutive tokens: `[L, 2, Hkv, T, D]`, exactly as large as the tokens."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def num_tokens(self) -> int:
        return self.tensor.shape[3]

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value: `[Hkv, T, D]`."""
        self.tensor[layer, 0].copy_(key)
        self.tensor[layer, 1].copy_(value)

    def keys(self, layer: int) -> Tensor:
        return self.tensor[layer, 0]

    def values(self, layer: int) -> Tensor:
        return self.tensor[layer, 1]

    def split(self, num_tokens: int) -> tuple[Self, Self]:
        """Copies, so that freeing one half really frees its memory."""
        upper, lower = self.tensor[:, :, :, :num_tokens], self.tensor[:, :, :, num_tokens:]
        return type(self)(upper.contiguous()), type(self)(lower.contiguous())


@dataclass(eq=False)
class TailArena:
    """Slots of equal capacity in one `[L, 2, B, Hkv, capacity, D]`; those in use are kept a prefix."""

    shape: KVShape
    capacity: int
    tensor: Tensor
    tails: list[Tail] = field(default_factory=list)

    @property
    def num_slots(self) -> int:
        return self.tensor.shape[2]


class KVCache(KVMemory):
    """Node by node and arena by arena."""

    max_copied_tokens = MAX_COPIED_TOKENS

    def __init__(self, shape: KVShape, budget_bytes: int) -> None:
        super().__init__(shape, budget_bytes)
        self.arenas: dict[int, TailArena] = {}

    def allocate_node(self, num_tokens: int) -> NodeKV:
        self.charge(self.bytes_for(num_tokens))
        s = self.shape
        size = (s.num_layers, 2, s.num_kv_heads, num_tokens, s.head_dim)
        return NodeKV(torch.empty(size, dtype=s.dtype, device=s.device))

    def free_node(self, kv: NodeMemory) -> None:
        self.allocated_bytes -= kv.num_bytes

    def open_tail(self, prompt: Sequence[NodeMemory] = ()) -> Tail:
        nodes = [node for node in prompt if isinstance(node, NodeKV)]
        num_tokens = sum(node.num_tokens for node in nodes)
        tail = self._place(Tail(next_capacity(num_tokens), -1))
        slot = self.arenas[tail.capacity].tensor[:, :, tail.place]  # [L, 2, Hkv, capacity, D]
        for node in nodes:
            slot[:, :, :, tail.length : tail.length + node.num_tokens] = node.tensor
            tail.length += node.num_tokens
        return tail

    def grow_tail(self, tail: Tail) -> None:
        if tail.length < tail.capacity:
            return
        moved = self._place(Tail(next_capacity(tail.capacity), -1, tail.length))
        source, target = self.arenas[tail.capacity], self.arenas[moved.capacity]
        target.tensor[:, :, moved.place, :, : tail.length].copy_(source.tensor[:, :, tail.place, :, : tail.length])
        self._vacate(tail)
        tail.capacity, tail.place = moved.capacity, moved.place
        target.tails[tail.place] = tail

    def close_tail(self, tail: Tail) -> None:
        self._vacate(tail)

    def trim(self) -> None:
        """Slots that arenas keep ready for further rows."""
        for arena in self.arenas.values():
            used = len(arena.tails)
            self.allocated_bytes -= self.bytes_for((arena.num_slots - used) * arena.capacity)
            arena.tensor = arena.tensor[:, :, :used].clone()

    def shrink(self, budget_bytes: int) -> None:
        self.trim()
        self.budget_bytes = budget_bytes

    def _place(self, tail: Tail) -> Tail:
        arena = self.arenas.get(tail.capacity)
        if arena is None or len(arena.tails) == arena.num_slots:
            arena = self._enlarge(tail.capacity, arena)
        tail.place = len(arena.tails)
        arena.tails.append(tail)
        return tail

    def _enlarge(self, capacity: int, arena: TailArena | None) -> TailArena:
        """Double the slots while the budget allows, else one more."""
        used = 0 if arena is None else arena.num_slots
        for num_slots in (max(2 * used, 1), used + 1):
            if self.has_room((num_slots - used) * capacity):
                break
        self.charge(self.bytes_for((num_slots - used) * capacity))
        s = self.shape
        size = (s.num_layers, 2, num_slots, s.num_kv_heads, capacity, s.head_dim)
        tensor = torch.zeros(size, dtype=s.dtype, device=s.device)  # a masked garbage NaN would still poison a sum
        if arena is None:
            arena = self.arenas[capacity] = TailArena(s, capacity, tensor)
        else:
            tensor[:, :, :used].copy_(arena.tensor)
            arena.tensor = tensor
        return arena

    def _vacate(self, tail: Tail) -> None:
        """The last slot moves into the hole, so that slots in use stay a prefix."""
        arena = self.arenas[tail.capacity]
        last = arena.tails.pop()
        if last is not tail:
            arena.tensor[:, :, tail.place, :, : last.length].copy_(arena.tensor[:, :, last.place, :, : last.length])
            last.place = tail.place
            arena.tails[tail.place] = last
        if not arena.tails:
            self.allocated_bytes -= self.bytes_for(arena.num_slots * arena.capacity)
            del self.arenas[tail.capacity]
