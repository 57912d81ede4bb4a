"""The tree of segments that many prompts share: one node for each stretch of tokens that is computed once.

A bidirectional segment is one node and is matched as a whole. Causal runs are matched token by token, as in a radix
tree: a run is cut where two prompts part; nobody has to declare it. Structure and counts only: what a node owns is
`NodeCache`'s. No model, no scheduler, no torch.
"""

from collections.abc import Iterator, Sequence

from segue.attention.segments import Segment
from segue.attention.tree.node import Node


class SegmentTree:
    """All prompts known at the moment, merged."""

    def __init__(self) -> None:
        self._roots = {is_long: Node((), False, None, 0, is_long=is_long) for is_long in (False, True)}

    def root(self, *, is_long: bool = False, is_private: bool = False) -> Node:
        """The top of the tree of all long or all other rows, or a new one for one row. Under different roots prompts
        never share."""
        return Node((), False, None, 0, is_long=is_long, is_private=True) if is_private else self._roots[is_long]

    def clear(self) -> None:
        """Forget all nodes but the roots."""
        for root in self._roots.values():
            root.children.clear()

    def insert(self, segments: Sequence[Segment], root: Node | None = None) -> Node:
        """The node at which this prompt ends; missing nodes are made. `segments` are canonical and not empty.

        Does not count the row: call `add_row` on the result. Raises ValueError for a prompt without tokens.
        """
        node = self.root() if root is None else root  # an empty node is falsy
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
        """Cut a causal node after `num_tokens`: returns the new upper half, `node` becomes the lower one.

        Raises ValueError for a bidirectional node.
        """
        if node.bidirectional:
            raise ValueError("a bidirectional segment is atomic and cannot be cut")
        parent = _parent_of(node)
        upper = Node(node.token_ids[:num_tokens], False, parent, node.start)
        upper.is_shared = node.is_shared
        upper.num_rows, upper.num_active, upper.num_scoring = node.num_rows, node.num_active, node.num_scoring
        upper.is_computed, upper.is_listed = node.is_computed, node.is_listed
        node.token_ids = node.token_ids[num_tokens:]
        node.start += num_tokens
        node.parent = upper
        upper.children[node.token_ids[0]] = node
        if node.is_listed:
            parent.children[upper.token_ids[0]] = upper
        return upper

    def fork_last_token(self, node: Node) -> Node:
        """A second, unlisted node for the last token of `node`'s prompt, not computed.

        For a prompt that ends inside a longer run that is computed already: its keys are there, but the final hidden
        state of its last token is not. One token is computed again.
        """
        parent = _parent_of(node) if len(node) == 1 else self.split(node, len(node) - 1)
        return Node(node.token_ids[-1:], False, parent, node.stop - 1, is_listed=False)

    def insert_scored(self, context: Node, token_ids: tuple[int, ...]) -> Node:
        """The node at which a continuation of `context` ends whose tokens are to be scored; counts it on each node.

        Tokens that were computed for a row that wanted no scores are computed again, in an unlisted node. Below an
        unlisted context the continuation is unlisted, too: nobody would find it.
        """
        end = self._insert_below(context, token_ids) if token_ids else context
        below = [node for node in end.path() if node.start >= context.stop]
        for node in below:
            if node.is_computed and node.scores is None:
                rest = below[below.index(node) :]
                tokens = tuple(token for other in rest for token in other.token_ids)
                end = Node(tokens, False, node.parent, node.start, is_listed=False)
                self.prune(rest[-1])  # with those that were just made
                break
        for node in end.path():
            node.num_scoring += node.start >= context.stop
        return end

    def _insert_below(self, context: Node, token_ids: tuple[int, ...]) -> Node:
        if context.is_listed:
            return self.insert((Segment(token_ids, False),), context)
        return Node(token_ids, False, context, context.stop, is_listed=False)

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
        """Uncount a row on every node of its path, and drop nodes that nobody needs and that own nothing."""
        for node in reversed(end.path()):
            node.num_rows -= 1
            self.prune(node)

    def prune(self, node: Node) -> None:
        """Unlink a node that has no rows, no children and no keys and values, and those above it that are left so."""
        while not (node.num_rows or node.children or node.kv is not None or node.parent is None):
            if node.is_listed and node.parent.children.get(_child_key(node)) is node:
                del node.parent.children[_child_key(node)]
            node = node.parent

    def __iter__(self) -> Iterator[Node]:
        """All listed nodes, depth-first."""
        stack = [child for root in self._roots.values() for child in root.children.values()][::-1]
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
