"""Keys and values under a byte budget: one tensor a tree node, one slot a generating row.

A node's keys are stored once, whatever the number of rows below it. A generating row appends its tokens to a
*tail*, a slot in an arena of fixed capacity, so that one attention call serves all rows of an arena.

Shapes: `L` layers, `Hkv` key heads, `T` tokens, `D` head width, `B` slots. Knows no tree and no scheduler.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

CPU = torch.device("cpu")


class KVMemoryExceeded(Exception):
    """The budget does not hold the allocation; nothing was allocated."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token occupies."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device = CPU

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class NodeKV:
    """Keys and values of consecutive tokens: `[L, 2, Hkv, T, D]`, exactly as large as the tokens."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

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

    def split(self, num_tokens: int) -> tuple["NodeKV", "NodeKV"]:
        """Copies, so that freeing one half really frees its memory."""
        upper, lower = self.tensor[:, :, :, :num_tokens], self.tensor[:, :, :, num_tokens:]
        return NodeKV(upper.contiguous()), NodeKV(lower.contiguous())


TAIL_CAPACITIES = (16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)  # tokens; a full tail moves to the next


@dataclass(eq=False, slots=True)
class Tail:
    """A generating row's own tokens: where they are and how many."""

    capacity: int
    slot: int
    length: int = 0


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


class KVCache:
    """The one owner of KV memory. `allocated_bytes` never exceeds `budget_bytes`."""

    def __init__(self, shape: KVShape, budget_bytes: int) -> None:
        self.shape = shape
        self.budget_bytes = budget_bytes
        self.allocated_bytes = 0
        self.arenas: dict[int, TailArena] = {}

    @property
    def budget_tokens(self) -> int:
        """How many tokens the budget holds."""
        return self.budget_bytes // self.shape.bytes_per_token

    def bytes_for(self, num_tokens: int) -> int:
        return num_tokens * self.shape.bytes_per_token

    def has_room(self, num_tokens: int) -> bool:
        return self.allocated_bytes + self.bytes_for(num_tokens) <= self.budget_bytes

    def allocate_node(self, num_tokens: int) -> NodeKV:
        """Uninitialised memory for `num_tokens`. Raises KVMemoryExceeded."""
        self._charge(self.bytes_for(num_tokens))
        s = self.shape
        size = (s.num_layers, 2, s.num_kv_heads, num_tokens, s.head_dim)
        return NodeKV(torch.empty(size, dtype=s.dtype, device=s.device))

    def free_node(self, kv: NodeKV) -> None:
        self.allocated_bytes -= kv.num_bytes

    def open_tail(self) -> Tail:
        """An empty tail of the smallest capacity. Raises KVMemoryExceeded."""
        return self._place(Tail(TAIL_CAPACITIES[0], -1))

    def grow_tail(self, tail: Tail) -> None:
        """Make room for one more token, moving a full tail to the next capacity. Raises KVMemoryExceeded."""
        if tail.length < tail.capacity:
            return
        moved = self._place(Tail(next_capacity(tail.capacity), -1, tail.length))
        source, target = self.arenas[tail.capacity], self.arenas[moved.capacity]
        target.tensor[:, :, moved.slot, :, : tail.length].copy_(source.tensor[:, :, tail.slot, :, : tail.length])
        self._vacate(tail)
        tail.capacity, tail.slot = moved.capacity, moved.slot
        target.tails[tail.slot] = tail

    def close_tail(self, tail: Tail) -> None:
        self._vacate(tail)

    def trim(self) -> None:
        """Give back the slots that arenas keep ready for further rows."""
        for arena in self.arenas.values():
            used = len(arena.tails)
            self.allocated_bytes -= self.bytes_for((arena.num_slots - used) * arena.capacity)
            arena.tensor = arena.tensor[:, :, :used].clone()

    def tail_bytes(self) -> int:
        """Memory of the arenas: slots in use and slots kept ready."""
        return sum(self.bytes_for(arena.num_slots * arena.capacity) for arena in self.arenas.values())

    def _charge(self, num_bytes: int) -> None:
        if self.allocated_bytes + num_bytes > self.budget_bytes:
            raise KVMemoryExceeded(f"{num_bytes} bytes wanted, {self.budget_bytes - self.allocated_bytes} left")
        self.allocated_bytes += num_bytes

    def _place(self, tail: Tail) -> Tail:
        arena = self.arenas.get(tail.capacity)
        if arena is None or len(arena.tails) == arena.num_slots:
            arena = self._enlarge(tail.capacity, arena)
        tail.slot = len(arena.tails)
        arena.tails.append(tail)
        return tail

    def _enlarge(self, capacity: int, arena: TailArena | None) -> TailArena:
        """Double the slots while the budget allows, else one more."""
        used = 0 if arena is None else arena.num_slots
        for num_slots in (max(2 * used, 1), used + 1):
            if self.has_room((num_slots - used) * capacity):
                break
        self._charge(self.bytes_for((num_slots - used) * capacity))
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
            arena.tensor[:, :, tail.slot, :, : last.length].copy_(arena.tensor[:, :, last.slot, :, : last.length])
            last.slot = tail.slot
            arena.tails[tail.slot] = last
        if not arena.tails:
            self.allocated_bytes -= self.bytes_for(arena.num_slots * arena.capacity)
            del self.arenas[tail.capacity]


def next_capacity(capacity: int) -> int:
    """The capacity a full tail moves to."""
    return next(larger for larger in TAIL_CAPACITIES if larger > capacity)
