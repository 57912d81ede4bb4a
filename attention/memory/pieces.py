"""Keys and values as separate tensors: one for each tree node, and one or more for the tail of a generating row.

A kernel is given the address of each tensor. Nothing is ever moved. Knows no tree and no scheduler.

Shapes: `L` layers, `Hkv` key heads, `T` tokens, `D` head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from segue.attention.memory.budget import TAIL_CAPACITIES, KVMemory, KVShape, Tail
from segue.attention.memory.node_memory import NodeMemory


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Keys and values of consecutive tokens, `[L, 2, Hkv, T, D]`, and what a kernel is told of them.

    Address and strides are kept because asking torch for them in every step takes longer.
    """

    tensor: Tensor
    address: int
    strides: tuple[int, ...]  # of all dimensions but the last
    num_tokens: int
    token_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        strides = tensor.stride()[:4]
        return cls(tensor, tensor.data_ptr(), strides, tensor.shape[3], strides[3] * tensor.element_size())

    @property
    def num_bytes(self) -> int:
        return self.tensor.nbytes

    def split(self, num_tokens: int) -> tuple[Self, Self]:
        """Copies, so that freeing one half really frees its memory."""
        upper, lower = self.tensor[:, :, :, :num_tokens], self.tensor[:, :, :, num_tokens:]
        return self.of(upper.contiguous()), self.of(lower.contiguous())

    def place(self, token: int = 0) -> tuple[int, ...]:
        """The address of a token's keys and values, and the strides."""
        return (self.address + token * self.token_bytes, *self.strides)

    def write(self, layer: int, key: Tensor, value: Tensor, first: int = 0) -> None:
        """key, value: `[Hkv, n, D]`, of the tokens that begin with number `first`."""
        tokens = slice(first, first + key.shape[1])
        self.tensor[layer, 0, :, tokens] = key
        self.tensor[layer, 1, :, tokens] = value

    def read(self, layer: int, num_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens, or of all, `[Hkv, n, D]` each. A view."""
        key, value = self.tensor[layer, :, :, :num_tokens]
        return key, value


class KVPieces(KVMemory):
    """One tensor a node. Each further piece of a tail is as long as all pieces before it."""

    def __init__(self, shape: KVShape, budget_bytes: int) -> None:
        super().__init__(shape, budget_bytes)
        self._pieces: dict[Tail, list[Piece]] = {}

    def allocate_node(self, num_tokens: int) -> Piece:
        return self._allocate(num_tokens)

    def free_node(self, kv: NodeMemory) -> None:
        self.allocated_bytes -= kv.num_bytes

    def open_tail(self, capacity: int = TAIL_CAPACITIES[0], most: int = TAIL_CAPACITIES[-1]) -> Tail:
        tail = Tail(capacity, most=most)
        self._pieces[tail] = [self._allocate(tail.capacity)]
        return tail

    def num_tokens_to_grow(self, tail: Tail) -> int:
        """The next piece's: what a tail has already stays where it is."""
        return tail.next_capacity - tail.capacity if tail.is_full else 0

    def grow_tail(self, tail: Tail) -> None:
        if num_tokens := self.num_tokens_to_grow(tail):
            self._pieces[tail].append(self._allocate(num_tokens))
            tail.capacity += num_tokens

    def close_tail(self, tail: Tail) -> None:
        del self._pieces[tail]
        self.allocated_bytes -= self.bytes_for(tail.capacity)

    def shrink(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes

    def grow(self, budget_bytes: int) -> bool:
        self.budget_bytes = budget_bytes
        return True

    def clear(self) -> None:
        self._pieces.clear()
        self.allocated_bytes = 0

    def pieces(self, tail: Tail, num_tokens: int) -> Iterator[tuple[Piece, int]]:
        """The pieces that hold the first tokens of a tail, in order, each with how many of these tokens it holds."""
        for piece in self._pieces[tail]:
            if num_tokens <= 0:
                return
            yield piece, min(num_tokens, piece.num_tokens)
            num_tokens -= piece.num_tokens

    def _allocate(self, num_tokens: int) -> Piece:
        self.charge(self.bytes_for(num_tokens))
        s = self.shape
        size = (s.num_layers, 2, s.num_kv_heads, num_tokens, s.head_dim)
        return Piece.of(torch.empty(size, dtype=s.dtype, device=s.device))
