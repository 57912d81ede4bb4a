"""What nodes and generating rows need of the memory for keys and values: a budget in bytes, and what is taken from it.

A node's keys are stored once, however many rows are below it. A generating row appends its tokens to its *tail*, which
grows when it is full. Knows no tensor's layout, no tree and no scheduler.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from segue.attention.memory.node_memory import NodeMemory

CPU = torch.device("cpu")
TAIL_CAPACITIES = tuple(16 << power for power in range(17))  # tokens; a full tail grows to the next


class KVMemoryExceeded(Exception):
    """The budget does not hold the allocation; nothing was allocated."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token takes."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device = CPU

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(eq=False, slots=True)
class Tail:
    """The tokens that a row has generated: how many there are, for how many there is room, and how many may come."""

    capacity: int
    start: int = 0  # in a pool: the place of the first token
    length: int = 0
    most: int = TAIL_CAPACITIES[-1]  # tokens that it will ever have

    @property
    def is_full(self) -> bool:
        return self.length >= self.capacity

    @property
    def next_capacity(self) -> int:
        """Raises ValueError if it has all the tokens that it was to have."""
        if self.capacity >= self.most:
            raise ValueError(f"a tail for {self.most} tokens has no room for more")
        return min(next_capacity(self.capacity), self.most)


class KVMemory(ABC):
    """The one owner of KV memory. `allocated_bytes` never exceeds `budget_bytes`."""

    def __init__(self, shape: KVShape, budget_bytes: int) -> None:
        self.shape = shape
        self.budget_bytes = budget_bytes
        self.allocated_bytes = 0

    @property
    def budget_tokens(self) -> int:
        """How many tokens the budget holds."""
        return self.budget_bytes // self.shape.bytes_per_token

    def bytes_for(self, num_tokens: int) -> int:
        return num_tokens * self.shape.bytes_per_token

    @property
    def num_free_tokens(self) -> int:
        return max(0, self.budget_bytes - self.allocated_bytes) // self.shape.bytes_per_token

    def has_room(self, num_tokens: int) -> bool:
        return self.allocated_bytes + self.bytes_for(num_tokens) <= self.budget_bytes

    @abstractmethod
    def allocate_node(self, num_tokens: int) -> NodeMemory:
        """Uninitialised memory for `num_tokens`. Raises KVMemoryExceeded."""

    @abstractmethod
    def free_node(self, kv: NodeMemory) -> None:
        """Give back what `allocate_node` gave, or one of the parts it was split into."""

    @abstractmethod
    def open_tail(self, capacity: int = TAIL_CAPACITIES[0], most: int = TAIL_CAPACITIES[-1]) -> Tail:
        """An empty tail that will have at most `most` tokens. Raises KVMemoryExceeded."""

    @abstractmethod
    def num_tokens_to_grow(self, tail: Tail) -> int:
        """How many tokens must be free before `grow_tail`."""

    @abstractmethod
    def grow_tail(self, tail: Tail) -> None:
        """Make room for one more token: a full tail gets the next capacity. Raises KVMemoryExceeded."""

    @abstractmethod
    def close_tail(self, tail: Tail) -> None:
        """Give back a tail's memory."""

    @abstractmethod
    def shrink(self, budget_bytes: int) -> None:
        """Lower the budget; what is allocated must fit into it."""

    @abstractmethod
    def grow(self, budget_bytes: int) -> bool:
        """Raise the budget again. False if the device has no memory for that."""

    @abstractmethod
    def clear(self) -> None:
        """Take everything back: as new, whatever an exception left half done."""

    def charge(self, num_bytes: int) -> None:
        """Count an allocation. Raises KVMemoryExceeded."""
        if self.allocated_bytes + num_bytes > self.budget_bytes:
            raise KVMemoryExceeded(f"{num_bytes} bytes wanted, {self.budget_bytes - self.allocated_bytes} left")
        self.allocated_bytes += num_bytes


def next_capacity(num_tokens: int) -> int:
    """The smallest capacity with room for one token more than `num_tokens`."""
    return next(capacity for capacity in TAIL_CAPACITIES if capacity > num_tokens)
