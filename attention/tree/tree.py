"""The tree of segments that many prompts share: one node for each stretch of tokens computed once.

A bidirectional segment is one node and is matched as a whole. A causal run is a token-level radix: it is cut
where two prompts part, without anybody declaring it. A node is named by where it *ends*, so cutting puts a new
node above and leaves every holder of the old one right.

Knows token ids and, opaquely, the keys and values a node owns. No model, no scheduler.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from segue.attention.memory.node_memory import NodeMemory
from segue.attention.segments import Segment

KEY_BYTES = 16


class SplittableScores(Protocol):
    """What a node needs of its tokens' scores: to be cut in two, and to give the hidden state at the cut."""

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
    """A stretch of tokens under one parent. `kv` is present from admission, valid once `is_computed`."""

    token_ids: tuple[int, ...]
    bidirectional: bool
    parent: "Node | None"
    start: int  # position of the first token
    children: dict[int | tuple[int, ...], "Node"] = field(default_factory=dict)
    num_rows: int = 0  # unfinished rows whose prompt passes through here
    is_shared: bool = False  # or has been: a second row has come
    num_active: int = 0  # of these, the rows that may not lose its keys and values
    num_scoring: int = 0  # rows that want the log-probabilities of its tokens
    is_listed: bool = True  # found by later prompts; False for a token computed again for its logits
    is_computed: bool = False
    kv: NodeMemory | None = None
    last_hidden: object | None = None  # final hidden state of the last token, for the logits after it
    scores: SplittableScores | None = None  # of its own tokens, if a row wanted them when it was computed

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
        """Root to here, the empty root left out."""
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


class SegmentTree:
    """All prompts known at the moment, merged. Structure only: it never computes and never evicts by itself."""

    def __init__(self) -> None:
        self.root = self.new_root()

    def new_root(self) -> Node:
        """A separate, empty tree: prompts under different roots never share."""
        return Node((), False, None, 0)

    def insert(self, segments: Sequence[Segment], root: Node | None = None) -> Node:
        """The node at which this prompt ends, made where missing. `segments` are canonical and not empty.

        Does not count the row: call `add_row` on the result.
        """
        node = self.root if root is None else root  # an empty node is falsy
        for segment in segments:
            if segment.bidirectional:
                node = _whole_child(node, segment.token_ids)
            else:
                node = self._descend_causal(node, segment.token_ids)
        if node.is_root:
            raise ValueError("a prompt must have at least one token, got none")
        return node

    def _descend_causal(self, node: Node, tokens: tuple[int, ...]) -> Node:
        matched = 0
        while matched < len(tokens):
            child = node.children.get(tokens[matched])
            if child is None:
                return _add_child(node, tokens[matched], tokens[matched:], bidirectional=False)
            common = _common_prefix(child.token_ids, tokens, matched)
            if common < len(child):
                child = self.split(child, common)
            node = child
            matched += common
        return node

    def split(self, node: Node, num_tokens: int) -> Node:
        """Cut a causal node after `num_tokens`; returns the new upper part, `node` keeps the lower one."""
        if node.bidirectional:
            raise ValueError("a bidirectional segment is atomic and cannot be cut")
        parent = _parent_of(node)
        upper = Node(node.token_ids[:num_tokens], False, parent, node.start)
        upper.is_shared = node.is_shared
        upper.num_rows, upper.num_active, upper.num_scoring = node.num_rows, node.num_active, node.num_scoring
        upper.is_computed, upper.is_listed = node.is_computed, node.is_listed
        if node.kv is not None:
            upper.kv, node.kv = node.kv.split(num_tokens)
        if node.scores is not None:
            upper.scores, node.scores = node.scores.split(num_tokens)
            upper.last_hidden = upper.scores.last_hidden
        node.token_ids = node.token_ids[num_tokens:]
        node.start += num_tokens
        node.parent = upper
        upper.children[node.token_ids[0]] = node
        if node.is_listed:
            parent.children[upper.token_ids[0]] = upper
        return upper

    def fork_last_token(self, node: Node) -> Node:
        """A second, unlisted node for the last token of `node`'s prompt, not computed.

        For a prompt that ends inside what was already computed as a longer run: its keys are there, but not the
        final hidden state of its last token. One token is computed again.
        """
        parent = _parent_of(node) if len(node) == 1 else self.split(node, len(node) - 1)
        return Node(node.token_ids[-1:], False, parent, node.stop - 1, is_listed=False)

    def insert_scored(self, context: Node, token_ids: tuple[int, ...]) -> Node:
        """The node at which a continuation of `context` ends whose tokens are to be scored; counts it on each node.

        Where such tokens were computed for somebody who wanted no scores, they are computed again, unlisted.
        """
        end = self.insert((Segment(token_ids, False),), context) if token_ids else context
        below = [node for node in end.path() if node.start >= context.stop]
        for node in below:
            if node.is_computed and node.scores is None:
                rest = tuple(token for other in below[below.index(node) :] for token in other.token_ids)
                end = Node(rest, False, node.parent, node.start, is_listed=False)
                break
        for node in end.path():
            node.num_scoring += node.start >= context.stop
        return end

    def remove_scored(self, end: Node, num_context_tokens: int) -> None:
        """Uncount what `insert_scored` counted."""
        for node in end.path():
            node.num_scoring -= node.start >= num_context_tokens

    def add_row(self, end: Node) -> None:
        """Count a row on every node of its path."""
        for node in end.path():
            node.is_shared = node.is_shared or node.num_rows > 0 or node.kv is not None
            node.num_rows += 1

    def remove_row(self, end: Node) -> None:
        """Uncount a row that is done with a path, and drop structure that nobody needs and that owns nothing."""
        for node in reversed(end.path()):
            node.num_rows -= 1
            self.prune(node)

    def prune(self, node: Node) -> None:
        """Unlink a node that has no rows, no children and no keys and values."""
        if node.num_rows or node.children or node.kv is not None or node.parent is None:
            return
        if node.is_listed:
            del node.parent.children[_child_key(node)]

    def __iter__(self) -> Iterator[Node]:
        """All listed nodes, depth-first."""
        stack = list(self.root.children.values())[::-1]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(list(node.children.values())[::-1])


def _parent_of(node: Node) -> Node:
    if node.parent is None:
        raise ValueError("the root has no parent")
    return node.parent


def _child_key(node: Node) -> int | tuple[int, ...]:
    """Causal children differ in their first token; bidirectional ones are told apart as a whole."""
    return node.token_ids if node.bidirectional else node.token_ids[0]


def _whole_child(node: Node, tokens: tuple[int, ...]) -> Node:
    return node.children.get(tokens) or _add_child(node, tokens, tokens, bidirectional=True)


def _add_child(node: Node, key: int | tuple[int, ...], tokens: tuple[int, ...], *, bidirectional: bool) -> Node:
    child = Node(tokens, bidirectional, node, node.stop)
    node.children[key] = child
    return child


def _common_prefix(edge: tuple[int, ...], tokens: tuple[int, ...], offset: int) -> int:
    """How many tokens of `edge` agree with `tokens[offset:]`."""
    limit = min(len(edge), len(tokens) - offset)
    if edge[:limit] == tokens[offset : offset + limit]:
        return limit
    return next(i for i in range(limit) if edge[i] != tokens[offset + i])
