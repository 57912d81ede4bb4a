"""What rows and nodes need of the memory for keys and values, whatever it is made of: a budget, and who takes of it.

A node's keys are stored once, whatever the number of rows below it. A generating row appends its tokens to a *tail*,
which may begin with the end of its prompt, and which moves to a larger place when it is full. Knows no tensor's layout,
no tree and no scheduler.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from segue.attention.tree.node_memory import NodeMemory

CPU = torch.device("cpu")
TAIL_CAPACITIES = tuple(16 << power for power in range(17))  # tokens; a full tail moves to the next


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


@dataclass(eq=False, slots=True)
class Tail:
    """A row's own tokens, generated and at the end of its prompt: where they are and how many."""

    capacity: int
    place: int  # a slot of an arena, the first token in a pool, or just a number
    length: int = 0


class KVMemory(ABC):
    """The one owner of KV memory. `allocated_bytes` never exceeds `budget_bytes`."""

    max_copied_tokens = 0  # of a prompt's end that no other row has, how many a tail had better begin with

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

    def has_room(self, num_tokens: int) -> bool:
        return self.allocated_bytes + self.bytes_for(num_tokens) <= self.budget_bytes

    @abstractmethod
    def allocate_node(self, num_tokens: int) -> NodeMemory:
        """Uninitialised memory for `num_tokens`. Raises KVMemoryExceeded."""

    @abstractmethod
    def free_node(self, kv: NodeMemory) -> None:
        """Give back what `allocate_node` gave, or one of the parts it was split into."""

    @abstractmethod
    def open_tail(self, prompt: Sequence[NodeMemory] = ()) -> Tail:
        """A tail that begins with a copy of these consecutive nodes. Raises KVMemoryExceeded."""

    @abstractmethod
    def grow_tail(self, tail: Tail) -> None:
        """Make room for one more token, moving a full tail to the next capacity. Raises KVMemoryExceeded."""

    @abstractmethod
    def close_tail(self, tail: Tail) -> None:
        """Give back a tail's memory."""

    @abstractmethod
    def trim(self) -> None:
        """Give back what is kept ready for further rows."""

    @abstractmethod
    def shrink(self, budget_bytes: int) -> None:
        """Have a smaller budget from now on; what is allocated must fit into it."""

    def charge(self, num_bytes: int) -> None:
        """Count an allocation. Raises KVMemoryExceeded."""
        if self.allocated_bytes + num_bytes > self.budget_bytes:
            raise KVMemoryExceeded(f"{num_bytes} bytes wanted, {self.budget_bytes - self.allocated_bytes} left")
        self.allocated_bytes += num_bytes


def next_capacity(num_tokens: int) -> int:
    """Of a tail that has so many tokens and room for one more: what a new one begins with, what a full one moves to."""
    return next(capacity for capacity in TAIL_CAPACITIES if capacity > num_tokens)
