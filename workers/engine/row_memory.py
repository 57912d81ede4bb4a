"""What a row holds in the tree: the nodes of its prompt, and the tails of its samples.

A row is *counted* on its nodes from the moment it waits, and *holds* them while it is prefilling or running. Knows the
tree and its memory; no queues.
"""

from collections.abc import Sequence

from segue.attention.memory.budget import TAIL_CAPACITIES, KVMemoryExceeded
from segue.attention.segments import Segment
from segue.attention.tree.cache import NodeCache
from segue.attention.tree.node import Node
from segue.workers.engine.plan import Prefill
from segue.workers.sampling.sample import Request, Sample


class RowMemory:
    """Counts rows on nodes, holds and releases these, and opens, grows and closes tails."""

    def __init__(self, nodes: NodeCache) -> None:
        self._nodes = nodes
        self._memory = nodes.memory

    def insert(self, request: Request) -> Prefill:
        """Count a new row."""
        end = self._nodes.insert(request.segments, request.root)
        if request.continuation is not None:
            end = self._insert_continuation(end, request.continuation)
        request.samples = [Sample(request, index, end) for index in range(request.num_drawn)]
        return self._counted(request, request.samples, end)

    def _insert_continuation(self, context: Node, continuation: tuple[int, ...]) -> Node:
        """The last token is scored from its parent and never fed. The first needs the context's last hidden state."""
        if context.is_computed and context.last_hidden is None:
            context = self._nodes.fork_last_token(context)
        return self._nodes.insert_scored(context, continuation[:-1])

    def insert_again(self, sample: Sample) -> Prefill:
        """Count a sample that gives way: what it generated becomes a part of its prompt, and is computed again."""
        self._close_tail(sample)
        request, old_end = sample.request, sample.end
        sample.end = self._nodes.insert(_with_generated(request.segments, sample.token_ids), request.root)
        prefill = self._counted(request, [sample], sample.end)
        self._leave(old_end, request)
        return prefill

    def _counted(self, request: Request, samples: list[Sample], end: Node) -> Prefill:
        for _ in samples:
            self._nodes.add_row(end)
        return Prefill(request, samples, end)

    def hold(self, prefill: Prefill, num_tail_tokens: int) -> bool:
        """Hold the nodes of a waiting row. False if there is not enough memory for them and so many tokens more."""
        if prefill.end.is_computed and prefill.end.last_hidden is None:
            self._fork_end(prefill)
        try:
            num_cached = self._nodes.acquire(prefill.end)
        except KVMemoryExceeded:
            return False
        if not self._nodes.make_room(num_tail_tokens):
            self._nodes.release(prefill.end)
            return False
        for _ in prefill.samples[1:]:
            self._nodes.acquire(prefill.end)
        if prefill.request.num_cached_tokens is None:
            prefill.request.num_cached_tokens = num_cached
        return True

    def _fork_end(self, prefill: Prefill) -> None:
        """The prompt ends inside a longer run that is already computed: its last token is computed again."""
        forked = self._nodes.fork_last_token(prefill.end)
        for sample in prefill.samples:
            self._nodes.add_row(forked)
            self._nodes.remove_row(sample.end)
            sample.end = forked
        prefill.end = forked

    def let_go(self, prefill: Prefill) -> None:
        """A prefilling row waits again: it does not hold its nodes any more, but is still counted on them."""
        for _ in prefill.samples:
            self._nodes.release(prefill.end)

    def drop(self, prefill: Prefill, *, held: bool) -> None:
        """A waiting or, if `held`, a prefilling row leaves for good."""
        if prefill.request.is_scored:
            self._nodes.remove_scored(prefill.end, prefill.request.num_prompt_tokens)
        for _ in prefill.samples:
            if held:
                self._leave(prefill.end, prefill.request)
            else:
                self._nodes.remove_row(prefill.end)

    def drop_sample(self, sample: Sample) -> None:
        """A running or finished sample leaves for good: free what only it needed."""
        self._close_tail(sample)
        self._leave(sample.end, sample.request)

    def _leave(self, end: Node, request: Request) -> None:
        """Nodes under a root of the row's own are of no use to others."""
        self._nodes.release(end, keep_idle=not request.root.is_private)
        self._nodes.remove_row(end)

    def open_tail(self, sample: Sample, *, is_alone: bool) -> bool:
        """False if there is no memory for it. A sample that is alone takes what there is."""
        most = sample.num_to_feed(len(sample.token_ids))
        capacity = min(TAIL_CAPACITIES[0], most)
        if not self._nodes.make_room(capacity):
            capacity = self._memory.num_free_tokens if is_alone else 0
        if capacity:
            sample.tail = self._memory.open_tail(capacity, most)
        return capacity > 0

    def grow_tail(self, sample: Sample) -> bool:
        """Make room for one more token of a running sample. False if there is no memory for it."""
        assert sample.tail is not None
        has_room = self._nodes.make_room(self._memory.num_tokens_to_grow(sample.tail))
        if has_room:
            self._memory.grow_tail(sample.tail)
        return has_room

    def _close_tail(self, sample: Sample) -> None:
        if sample.tail is not None:
            self._memory.close_tail(sample.tail)
            sample.tail = None


def _with_generated(segments: Sequence[Segment], token_ids: Sequence[int]) -> tuple[Segment, ...]:
    """Generated tokens are causal. After a causal prompt they are one run with it."""
    if segments and not segments[-1].bidirectional:
        return (*segments[:-1], Segment(segments[-1].token_ids + tuple(token_ids), False))
    return (*segments, Segment(tuple(token_ids), False))
