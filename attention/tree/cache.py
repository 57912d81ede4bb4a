"""Which nodes own keys and values right now: acquired by rows, kept while memory lasts, evicted leaf first.

A node that no running row needs stays resident, because the next rows of a depth-first order usually want it; it is the
first to go when memory is short. What one row alone has ever used is seldom wanted again: little of that is kept, so
that memory does not grow with the rows that are done. Knows the tree and the cache; no rows, no scheduler.
"""

from collections import OrderedDict

from segue.attention.memory.budget import KVMemory, KVMemoryExceeded
from segue.attention.tree.tree import Node, SegmentTree

UNSHARED_SHARE = 1 / 32  # of the budget, for idle nodes of a single row
UNSHARED_TOKENS = 4096  # but at least so many


class Residency:
    """Reference counts and eviction. `keep_idle=False` frees a node as soon as its last row leaves (reuse off)."""

    def __init__(self, tree: SegmentTree, cache: KVMemory, *, keep_idle: bool = True) -> None:
        self.tree = tree
        self.cache = cache
        self.keep_idle = keep_idle
        self._idle: OrderedDict[Node, None] = OrderedDict()  # children stand before their parents
        self._unshared: OrderedDict[Node, int] = OrderedDict()  # of these, with how many tokens each came
        self._num_unshared = 0  # tokens

    def acquire(self, end: Node) -> int:
        """Hold every node of a path, allocating what is missing; returns how many tokens were there already.

        Raises KVMemoryExceeded, holding nothing, if the budget does not allow it even after eviction.
        """
        path = end.path()
        for node in path:
            node.num_active += 1
            self._unset_idle(node)
        missing = [node for node in path if node.kv is None]
        num_missing = sum(len(node) for node in missing)
        if not self.make_room(num_missing):
            self.release(end)
            raise KVMemoryExceeded(f"{num_missing} tokens do not fit into {self.cache.budget_bytes} bytes of KV memory")
        for node in missing:
            node.kv = self.cache.allocate_node(len(node))
        return end.stop - num_missing

    def release(self, end: Node, *, keep_idle: bool = True) -> None:
        """Let go of a path, leaf first."""
        for node in reversed(end.path()):
            node.num_active -= 1
            if node.num_active == 0 and node.kv is not None:
                self._set_idle(node, keep_idle=keep_idle and self.keep_idle)

    def make_room(self, num_tokens: int) -> bool:
        """Evict idle nodes until `num_tokens` fit: first those that no waiting row wants, then the rest, oldest first.

        Of the first some more than needed, since looking through all idle nodes takes time.
        """
        if self.cache.has_room(num_tokens):
            return True
        passes = [(_is_unwanted, self.cache.budget_tokens // 64), (_is_any, 0)]
        for is_expendable, margin in passes:
            for node in list(self._idle):
                if is_expendable(node):
                    self._free(node)
                    if self.cache.has_room(num_tokens + margin):
                        return True
            if self.cache.has_room(num_tokens):
                return True
        return False

    def discard(self, end: Node) -> None:
        """Forget an idle node and whatever hangs below it: its numbers are not to be trusted."""
        if end.num_active == 0 and end.kv is not None:
            self._free(end)

    def _set_idle(self, node: Node, *, keep_idle: bool) -> None:
        if not (keep_idle and node.is_computed and node.is_listed):
            self._free(node)
            return
        self._idle[node] = None
        if not node.is_shared:
            self._unshared[node] = len(node)
            self._num_unshared += len(node)
        while self._num_unshared > max(UNSHARED_SHARE * self.cache.budget_tokens, UNSHARED_TOKENS):
            self._free(next(iter(self._unshared)))

    def _unset_idle(self, node: Node) -> None:
        self._idle.pop(node, None)
        self._num_unshared -= self._unshared.pop(node, 0)

    def _free(self, node: Node) -> None:
        self._unset_idle(node)
        if node.kv is not None:
            self.cache.free_node(node.kv)
        node.kv = None
        node.is_computed = False
        node.last_hidden = None
        node.scores = None
        self.tree.prune(node)


def _is_unwanted(node: Node) -> bool:
    return node.num_rows == 0


def _is_any(node: Node) -> bool:
    return True
