"""Keys and values where a kernel is told by address what a row sees: one tensor a tree node, and for each generating
row as many tensors as it has outgrown. Nothing is ever moved.

Shapes: `L` layers, `Hkv` key heads, `T` tokens, `D` head width. Knows no scheduler.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from segue.attention.cpu.kv_cache import NodeKV
from segue.attention.memory.budget import KVMemory, KVShape, Tail, next_capacity
from segue.attention.tree.node_memory import NodeMemory
from segue.attention.tree.tree import Node


@dataclass(frozen=True, slots=True)
class Piece:
    """Keys and values of consecutive tokens, `[L, 2, Hkv, T, D]`, and what a kernel is told of them."""

    tensor: Tensor
    address: int
    strides: tuple[int, ...]  # of all dimensions but the last
    num_tokens: int
    token_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        strides = tensor.stride()[:4]
        return cls(tensor, tensor.data_ptr(), strides, tensor.shape[3], strides[3] * tensor.element_size())

    def place(self, token: int = 0) -> tuple[int, ...]:
        """Where a token's keys and values begin."""
        return (self.address + token * self.token_bytes, *self.strides)


class PieceOfNode(NodeKV):
    """A node's tokens, which are told again in each step that sees them."""

    __slots__ = ("piece",)

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        self.piece = Piece.of(tensor)


def piece_of(node: Node) -> Piece:
    """Raises ValueError if the node has no memory of this kind."""
    if not isinstance(node.kv, PieceOfNode):
        raise ValueError(f"a node of {len(node)} tokens at position {node.start} has no KV memory in pieces")
    return node.kv.piece


class KVPieces(KVMemory):
    """Node by node and tail by tail. Each further piece of a tail is as long as all before it."""

    def __init__(self, shape: KVShape, budget_bytes: int) -> None:
        super().__init__(shape, budget_bytes)
        self._pieces: dict[int, list[Piece]] = {}  # by a tail's place, which is a number
        self._num_opened = 0

    def allocate_node(self, num_tokens: int) -> PieceOfNode:
        return PieceOfNode(self._allocate(num_tokens))

    def free_node(self, kv: NodeMemory) -> None:
        self.allocated_bytes -= kv.num_bytes

    def open_tail(self, prompt: Sequence[NodeMemory] = ()) -> Tail:
        if prompt:
            raise ValueError("tails begin empty here: a node more costs the kernel nothing")
        tail = Tail(next_capacity(0), self._num_opened)
        self._pieces[tail.place] = [Piece.of(self._allocate(tail.capacity))]
        self._num_opened += 1
        return tail

    def grow_tail(self, tail: Tail) -> None:
        if tail.length < tail.capacity:
            return
        capacity = next_capacity(tail.capacity)
        self._pieces[tail.place].append(Piece.of(self._allocate(capacity - tail.capacity)))
        tail.capacity = capacity

    def close_tail(self, tail: Tail) -> None:
        del self._pieces[tail.place]
        self.allocated_bytes -= self.bytes_for(tail.capacity)

    def trim(self) -> None:
        """Nothing is kept ready."""

    def shrink(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes

    def pieces(self, tail: Tail, num_tokens: int) -> Iterator[tuple[Piece, int]]:
        """Those with the first tokens of a tail, and how many each has of them, in order."""
        for piece in self._pieces[tail.place]:
            if num_tokens <= 0:
                return
            yield piece, min(num_tokens, piece.num_tokens)
            num_tokens -= piece.num_tokens

    def _allocate(self, num_tokens: int) -> Tensor:
        self.charge(self.bytes_for(num_tokens))
        s = self.shape
        return torch.empty((s.num_layers, 2, s.num_kv_heads, num_tokens, s.head_dim), dtype=s.dtype, device=s.device)
