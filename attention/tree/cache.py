"""The tree of an engine: which nodes own keys and values, which of them are idle, and which are evicted.

A node that no row holds any more is *idle*. It keeps its keys, since the next rows of a depth-first order usually want
it, and it is the first to go when memory is short: children before their parents. A node that only one row has ever
used is seldom wanted again: few of these are kept, so that memory does not grow with the number of finished rows.
Knows the tree and the memory; no rows, no scheduler.
"""

from collections import OrderedDict

from segue.attention.memory.budget import KVMemory, KVMemoryExceeded
from segue.attention.tree.node import Node, SplittableScores
from segue.attention.tree.tree import SegmentTree

UNSHARED_SHARE = 1 / 32  # of the budget, for idle nodes of a single row
UNSHARED_TOKENS = 4096  # but at least so many


class NodeCache(SegmentTree):
    """A tree whose nodes own memory. `keep_idle=False` frees a node as soon as its last row leaves (no reuse)."""

    def __init__(self, memory: KVMemory, *, keep_idle: bool = True) -> None:
        super().__init__()
        self.memory = memory
        self.keep_idle = keep_idle
        self._idle: OrderedDict[Node, None] = OrderedDict()  # children stand before their parents
        self._unshared: OrderedDict[Node, int] = OrderedDict()  # those that one row has used, and their tokens
        self._num_unshared = 0  # tokens

    def clear(self) -> None:
        """Forget all nodes, and all memory with them: as new, whatever an exception left half done."""
        super().clear()
        self._idle.clear()
        self._unshared.clear()
        self._num_unshared = 0
        self.memory.clear()

    def acquire(self, end: Node) -> int:
        """Hold every node of a path and allocate what is missing; returns how many tokens were there already.

        Raises KVMemoryExceeded if the budget does not allow it even after eviction; then nothing is held.
        """
        path = end.path()
        for node in path:
            node.num_active += 1
            self._unset_idle(node)
        missing = [node for node in path if node.kv is None]
        num_missing = sum(len(node) for node in missing)
        if not self.make_room(num_missing):
            self.release(end)
            raise KVMemoryExceeded(
                f"{num_missing} tokens do not fit into {self.memory.budget_bytes} bytes of KV memory"
            )
        for node in missing:
            node.kv = self.memory.allocate_node(len(node))
        return end.stop - num_missing

    def release(self, end: Node, *, keep_idle: bool = True) -> None:
        """Let go of a path, leaf first."""
        for node in reversed(end.path()):
            node.num_active -= 1
            if node.num_active == 0 and node.kv is not None:
                self._set_idle(node, keep_idle=keep_idle and self.keep_idle)

    def make_room(self, num_tokens: int) -> bool:
        """Evict idle nodes until `num_tokens` fit: first those that no waiting row wants, then the rest, oldest first.

        Of the first kind some more than needed are evicted, since looking through all idle nodes takes time.
        """
        if self.memory.has_room(num_tokens):
            return True
        passes = [(_is_unwanted, self.memory.budget_tokens // 64), (_is_any, 0)]
        for is_expendable, margin in passes:
            for node in list(self._idle):
                if is_expendable(node):
                    self._free(node)
                    if self.memory.has_room(num_tokens + margin):
                        return True
            if self.memory.has_room(num_tokens):
                return True
        return False

    def discard(self, end: Node) -> None:
        """Forget an idle node, whose numbers are not to be trusted."""
        if end.num_active == 0 and end.kv is not None:
            self._free(end)

    def keep_computed(self, node: Node, last_hidden: object) -> None:
        """The node's keys and values are complete; `last_hidden` is the final hidden state of its last token."""
        if node.kv is None:
            raise ValueError(f"a node of {len(node)} tokens at position {node.start} has no KV memory")
        node.is_computed = True
        node.last_hidden = last_hidden

    def keep_scores(self, node: Node, scores: SplittableScores) -> None:
        """The scores of the node's tokens."""
        node.scores = scores

    def split(self, node: Node, num_tokens: int) -> Node:
        """See `SegmentTree.split`. Each half owns its part of what the node owned; both are idle if the node was."""
        upper = super().split(node, num_tokens)
        if node.kv is not None:
            upper.kv, node.kv = node.kv.split(num_tokens)
        if node.scores is not None:
            upper.scores, node.scores = node.scores.split(num_tokens)
            upper.last_hidden = upper.scores.last_hidden
        if node in self._idle:
            self._list_idle_above(node, upper)
        return upper

    def _list_idle_above(self, node: Node, upper: Node) -> None:
        """The upper half stands behind the lower one, and its parents behind it: they go last."""
        if node in self._unshared:
            self._unshared[node] = len(node)
            self._num_unshared -= len(upper)
        for above in reversed(upper.path()):
            if above is upper or above in self._idle:
                self._list_idle(above)

    def _set_idle(self, node: Node, *, keep_idle: bool) -> None:
        if not (keep_idle and node.is_computed and node.is_listed):
            self._free(node)
            return
        self._list_idle(node)
        while self._num_unshared > max(UNSHARED_SHARE * self.memory.budget_tokens, UNSHARED_TOKENS):
            self._free(next(iter(self._unshared)))

    def _list_idle(self, node: Node) -> None:
        """As the last to go."""
        self._unset_idle(node)
        self._idle[node] = None
        if not node.is_shared:
            self._unshared[node] = len(node)
            self._num_unshared += len(node)

    def _unset_idle(self, node: Node) -> None:
        self._idle.pop(node, None)
        self._num_unshared -= self._unshared.pop(node, 0)

    def _free(self, node: Node) -> None:
        self._unset_idle(node)
        if node.kv is not None:
            self.memory.free_node(node.kv)
        node.kv = None
        node.is_computed = False
        node.last_hidden = None
        node.scores = None
        self.prune(node)


def _is_unwanted(node: Node) -> bool:
    return node.num_rows == 0


def _is_any(node: Node) -> bool:
    return True
