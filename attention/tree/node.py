"""A node of the tree: tokens that are computed once, with what is counted and kept for them.

A node is named by where it *ends*: when it is cut, a new node is put above it, and every holder of the old one stays
right. Only the modules of this package write a node's fields; everybody else reads them. Knows no model and no memory.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Protocol, Self

from segue.attention.memory.node_memory import NodeMemory
from segue.attention.segments import Segment

KEY_BYTES = 16


class SplittableScores(Protocol):
    """What a node needs of its tokens' scores: they can be cut in two, and tell the hidden state at the cut."""

    def split(self, num_tokens: int) -> tuple[Self, Self]: ...

    @property
    def last_hidden(self) -> object: ...


def chain_key(parent_key: bytes, segment: Segment) -> bytes:
    """The identity of everything up to this segment's end: parent key, kind and token ids, hashed.

    Equal keys mean equal keys and values. The first parent key is the salt: whatever else changes the numbers
    (model, revision, adapter, dtype, mask).
    """
    kind = b"b" if segment.bidirectional else b"c"
    tokens = b"".join(token.to_bytes(4, "big") for token in segment.token_ids)
    return hashlib.blake2b(parent_key + kind + tokens, digest_size=KEY_BYTES).digest()


@dataclass(eq=False, slots=True)
class Node:
    """A stretch of tokens under one parent. `kv` is there once a row holds the node, and valid once `is_computed`."""

    token_ids: tuple[int, ...]
    bidirectional: bool
    parent: "Node | None"
    start: int  # position of the first token
    children: dict[int | tuple[int, ...], "Node"] = field(default_factory=dict)
    num_rows: int = 0  # unfinished rows whose prompt passes through here
    is_shared: bool = False  # a second row has passed through here
    num_active: int = 0  # of `num_rows`, those that hold the keys and values
    num_scoring: int = 0  # rows that want the log-probabilities of its tokens
    is_listed: bool = True  # later prompts find it; False for tokens that are computed again
    is_computed: bool = False
    kv: NodeMemory | None = None
    last_hidden: object | None = None  # final hidden state of the last token, for the logits after it
    scores: SplittableScores | None = None  # of its own tokens, if a row wanted them when it was computed
    is_long: bool = False  # of a root: for rows that the model computes as long ones (`workers/models/long_rope.py`)
    is_private: bool = False  # of a root: for one row, which shares nothing

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def stop(self) -> int:
        """Position after the last token: the length of the prompt that ends here."""
        return self.start + len(self.token_ids)

    @property
    def is_root(self) -> bool:
        return self.parent is None

    def path(self) -> list["Node"]:
        """The nodes from the root to here, without the root, which is empty."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def segments(self) -> tuple[Segment, ...]:
        """The chain of segments that ends here; causal nodes cut from one run are joined again."""
        chain: list[Segment] = []
        for node in self.path():
            if chain and not node.bidirectional and not chain[-1].bidirectional:
                chain[-1] = Segment(chain[-1].token_ids + node.token_ids, False)
            else:
                chain.append(Segment(node.token_ids, node.bidirectional))
        return tuple(chain)

    def key(self, salt: bytes = b"") -> bytes:
        """The chained key of the prompt that ends here: independent of where causal runs happen to be cut."""
        key = salt
        for segment in self.segments():
            key = chain_key(key, segment)
        return key
