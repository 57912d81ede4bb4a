"""Where a step's nodes and tails have their keys, in memory of pieces."""

from collections.abc import Sequence

from segue.attention.memory.budget import KVMemory, Tail
from segue.attention.memory.pieces import KVPieces, Piece
from segue.attention.tree.node import Node


def piece_of(node: Node) -> Piece:
    """Raises ValueError if the node has no memory of this kind."""
    if not isinstance(node.kv, Piece):
        raise ValueError(f"a node of {len(node)} tokens at position {node.start} has no KV memory in pieces")
    return node.kv


def pieces_of(tails: Sequence[Tail], memory: KVMemory) -> list[list[tuple[Piece, int]]]:
    """Of each tail the pieces with its tokens and the next one, in order, and how much of each is used."""
    if not isinstance(memory, KVPieces):
        raise TypeError(f"wanted memory of pieces, got {type(memory).__name__}")
    return [list(memory.pieces(tail, tail.length + 1)) for tail in tails]
