"""Keys and values in one pool for each layer, for kernels that take many sequences in a call: a sequence is told by the
place of its first key and the number of its keys.

Each node and each tail is an *extent*: as many consecutive places of the pool as it needs. Pages would waste most of
their memory here: the smallest page of torch's bundled kernel has 256 tokens, and a choice or a question has twenty.
The price is fragmentation: when no gap is long enough, everything in use is moved to the front. Cutting a node copies
nothing.

Shapes: `P` tokens of the pool, `Hkv` key heads, `D` head width. Knows no tree and no scheduler.
"""

from collections.abc import Sequence
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from segue.attention.memory.budget import TAIL_CAPACITIES, KVMemory, KVMemoryExceeded, KVShape, Tail
from segue.attention.memory.extents import Extents
from segue.attention.memory.node_memory import NodeMemory

MOVED_TOKENS = 4096  # at once: 16 MiB of a layer with 8 heads of 128 numbers in bf16
MAX_POOL_TOKENS = 2**31 - 1  # kernels count in 32 bits


class Extent:
    """Keys and values of consecutive tokens: places `[start, start + length)` of the pool."""

    __slots__ = ("_pool", "length", "start")

    def __init__(self, pool: "KVPool", start: int, length: int) -> None:
        self._pool = ref(pool)  # nodes form cycles, and must not keep gigabytes until these are collected
        self.start = start
        self.length = length

    @property
    def num_bytes(self) -> int:
        return self._own_pool().bytes_for(self.length)

    def split(self, num_tokens: int) -> tuple["Extent", "Extent"]:
        """Both halves stay where they are."""
        return self._own_pool().split(self, num_tokens)

    def _own_pool(self) -> "KVPool":
        pool = self._pool()
        if pool is None:
            raise ReferenceError("the pool of these keys and values is gone")
        return pool


class KVPool(KVMemory):
    """The pools of all layers, allocated at once. `layer_devices`: of each layer, by default `shape.device`.

    A pool has one place more than it hands out, `scratch`, for tokens that nobody reads.
    """

    def __init__(self, shape: KVShape, budget_bytes: int, layer_devices: Sequence[torch.device] | None = None) -> None:
        budget_bytes = min(budget_bytes, MAX_POOL_TOKENS * shape.bytes_per_token)
        super().__init__(shape, budget_bytes)
        size = (2, self.budget_tokens + 1, shape.num_kv_heads, shape.head_dim)
        devices = layer_devices or [shape.device] * shape.num_layers
        self.tensors = [torch.empty(size, dtype=shape.dtype, device=device) for device in devices]  # [2, P + 1, Hkv, D]
        self.num_compactions = 0
        self.generation = 0  # counts changes of `tensors`: a smaller pool has other tensors
        self._extents = Extents(self.budget_tokens)
        self._nodes: dict[Extent, None] = {}
        self._tails: dict[Tail, None] = {}

    @property
    def scratch(self) -> int:
        """The place that belongs to no node and no tail."""
        return self._extents.size

    def allocate_node(self, num_tokens: int) -> Extent:
        extent = Extent(self, self._allocate(num_tokens), num_tokens)
        self._nodes[extent] = None
        return extent

    def free_node(self, kv: NodeMemory) -> None:
        if not isinstance(kv, Extent):
            raise TypeError(f"wanted an extent of this pool, got {type(kv).__name__}")
        del self._nodes[kv]
        self._free(kv.start, kv.length)

    def split(self, extent: Extent, num_tokens: int) -> tuple[Extent, Extent]:
        """Two extents instead of one, in the same places."""
        del self._nodes[extent]
        upper = Extent(self, extent.start, num_tokens)
        lower = Extent(self, extent.start + num_tokens, extent.length - num_tokens)
        self._nodes |= {upper: None, lower: None}
        return upper, lower

    def open_tail(self, capacity: int = TAIL_CAPACITIES[0], most: int = TAIL_CAPACITIES[-1]) -> Tail:
        tail = Tail(capacity, self._allocate(capacity), most=most)
        self._tails[tail] = None
        return tail

    def num_tokens_to_grow(self, tail: Tail) -> int:
        """The whole new tail's: it is allocated before the old one is copied and freed."""
        return tail.next_capacity if tail.is_full else 0

    def grow_tail(self, tail: Tail) -> None:
        capacity = self.num_tokens_to_grow(tail)
        if not capacity:
            return
        start = self._allocate(capacity)  # may move the tail
        for tensor in self.tensors:
            tensor[:, start : start + tail.length] = tensor[:, tail.start : tail.start + tail.length]
        self._free(tail.start, tail.capacity)
        tail.capacity, tail.start = capacity, start

    def close_tail(self, tail: Tail) -> None:
        del self._tails[tail]
        self._free(tail.start, tail.capacity)

    def shrink(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._compact(self.budget_tokens)

    def grow(self, budget_bytes: int) -> bool:
        """One layer at a time is held twice. Nothing moves, so a layer that is larger than the others is no harm."""
        size = budget_bytes // self.shape.bytes_per_token
        try:
            self._lengthen(size)
        except torch.OutOfMemoryError:
            return False
        self._extents.grow(size)
        self.budget_bytes = budget_bytes
        return True

    def _lengthen(self, size: int) -> None:
        for layer, tensor in enumerate(self.tensors):
            if tensor.shape[1] < size + 1:
                larger = tensor.new_empty((2, size + 1, *tensor.shape[2:]))
                larger[:, : tensor.shape[1]] = tensor
                self.tensors[layer] = larger
                self.generation += 1

    def clear(self) -> None:
        size = self.budget_tokens
        for layer, tensor in enumerate(self.tensors):
            if tensor.shape[1] != size + 1:  # it was about to be replaced
                self.generation += 1
                self.tensors[layer] = tensor.new_empty(0)
                self.tensors[layer] = tensor.new_empty((2, size + 1, self.shape.num_kv_heads, self.shape.head_dim))
        self._extents = Extents(size)
        self._nodes.clear()
        self._tails.clear()
        self.allocated_bytes = 0

    def _allocate(self, num_tokens: int) -> int:
        num_bytes = self.bytes_for(num_tokens)
        if self.allocated_bytes + num_bytes > self.budget_bytes:
            raise KVMemoryExceeded(f"{num_bytes} bytes wanted, {self.budget_bytes - self.allocated_bytes} left")
        start = self._extents.allocate(num_tokens)
        if start is None:
            self._compact(self._extents.size)
            start = self._extents.allocate(num_tokens)
        if start is None:
            raise RuntimeError(f"{num_tokens} tokens fit into the pool's budget and not into the pool")
        self.charge(num_bytes)
        return start

    def _free(self, start: int, length: int) -> None:
        self._extents.free(start, length)
        self.allocated_bytes -= self.bytes_for(length)

    def _compact(self, size: int) -> None:
        """Move all that is in use to the front of a pool of `size` tokens, some tokens at a time."""
        used: list[Extent | Tail] = sorted([*self._nodes, *self._tails], key=lambda each: each.start)
        starts = np.array([each.start for each in used], dtype=np.int64)
        lengths = np.array(
            [each.length if isinstance(each, Extent) else each.capacity for each in used], dtype=np.int64
        )
        places = ranges(starts, lengths)
        if len(places) > size:
            raise KVMemoryExceeded(f"{len(places)} tokens in use do not fit into {size}")
        for tensor in self.tensors:
            _move(tensor, places)
        self._extents = Extents(size)
        for each, length in zip(used, lengths.tolist(), strict=True):
            start = self._extents.allocate(length)
            if start is None:
                raise RuntimeError("an empty pool has one gap")
            each.start = start
        self.num_compactions += 1
        self._cut(size, len(places))

    def _cut(self, size: int, num_used: int) -> None:
        """Give back what lies behind `size` tokens."""
        for layer, tensor in enumerate(self.tensors):
            if size + 1 == tensor.shape[1]:
                continue
            kept = tensor[:, :num_used].clone()
            self.generation += 1
            self.tensors[layer] = tensor = tensor.new_empty(2, 0)  # the old one goes before the new one comes
            smaller = kept.new_empty(2, size + 1, *kept.shape[2:])
            smaller[:, :num_used] = kept
            self.tensors[layer] = smaller


def _move(tensor: Tensor, places: np.ndarray) -> None:
    """Tokens `[2, P, Hkv, D]` from ascending places to the front: no token lands on one that is still to be moved."""
    index = torch.from_numpy(places).to(tensor.device)
    for start in range(0, len(index), MOVED_TOKENS):
        part = index[start : start + MOVED_TOKENS]
        tensor[:, start : start + len(part)] = tensor.index_select(1, part)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`[start, start + length)` of each, one after the other."""
    if not len(lengths):
        return np.empty(0, dtype=np.int64)
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
