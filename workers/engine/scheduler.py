"""Which rows run, which nodes and tokens the next step computes, and who gives way when KV memory is short.

Rows run in the order given, which a plan makes depth-first. Every running sample decodes in every step; the rest of the
token budget goes to prefill, whole bidirectional segments at a time. Knows the tree and its memory; no model.
"""

from collections import deque
from collections.abc import Container, Iterator, Sequence

from segue.attention.memory.budget import TAIL_CAPACITIES, KVMemoryExceeded
from segue.attention.segments import Segment
from segue.attention.tree.cache import NodeCache
from segue.attention.tree.node import Node
from segue.workers.engine.plan import Prefill, StepPlan
from segue.workers.errors import RowError, RowErrorCode
from segue.workers.sampling.sample import Request, Sample

MIN_PIECE_TOKENS = 64  # a causal run is not cut for less: every cut is one more block in each later step


class Scheduler:
    """Queues of rows over one tree. `max_num_batched_tokens` bounds a step, save for a longer atomic segment."""

    def __init__(self, nodes: NodeCache, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be at least max_num_seqs ({max_num_seqs}), got {max_num_batched_tokens}"
            )
        self.nodes = nodes
        self.memory = nodes.memory
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Prefill] = deque()
        self.prefilling: list[Prefill] = []
        self.running: list[Sample] = []
        self._failed: list[tuple[Request, RowError]] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    @property
    def num_active(self) -> int:
        """Samples that hold KV memory."""
        return len(self.running) + sum(len(prefill.samples) for prefill in self.prefilling)

    def add(self, request: Request) -> None:
        """Queue a new row behind the others."""
        end = self.nodes.insert(request.segments, request.root)
        if request.continuation is not None:
            end = self._insert_continuation(end, request.continuation)
        request.samples = [Sample(request, index, end) for index in range(request.params.n)]
        self.waiting.append(self._prefill(request, request.samples, end))

    def _insert_continuation(self, context: Node, continuation: tuple[int, ...]) -> Node:
        """The last token is scored from its parent and never fed. The first needs the context's last hidden state."""
        if context.is_computed and context.last_hidden is None:
            context = self.nodes.fork_last_token(context)
        return self.nodes.insert_scored(context, continuation[:-1])

    def requests(self) -> Iterator[Request]:
        """All rows, each once."""
        prefills = [*self.waiting, *self.prefilling]
        return iter(dict.fromkeys([*(p.request for p in prefills), *(s.request for s in self.running)]))

    def plan_step(self) -> StepPlan:
        """Grow tails, admit rows, fill the token budget. Rows that can never fit leave; see `take_failed`."""
        self._grow_tails()
        self._admit()
        decoding = list(self.running)
        new = self._new_nodes(self.max_num_batched_tokens - len(decoding))
        complete = [prefill for prefill in self.prefilling if _is_complete(prefill.end, new)]
        return StepPlan(tuple(new), tuple(decoding), tuple(complete))

    def start_decoding(self, prefill: Prefill) -> None:
        """The prompt is computed and every sample has drawn; what is unfinished goes on."""
        self.prefilling.remove(prefill)
        for sample in prefill.samples:
            if sample.finish_reason:
                self._leave(sample.end, sample.request)
            elif self._open_tail(sample):
                self.running.append(sample)

    def finish_prompt(self, prefill: Prefill) -> None:
        """The prompt is computed, and the row wants nothing more."""
        self.prefilling.remove(prefill)
        self._drop(prefill, held=True)

    def finish(self, sample: Sample) -> None:
        """A running sample is done: free what only it needed."""
        self.running.remove(sample)
        self._close(sample)
        self._leave(sample.end, sample.request)

    def take_failed(self) -> list[tuple[Request, RowError]]:
        """Rows that have left since the last call because they can never fit."""
        failed, self._failed = self._failed, []
        return failed

    def abort(self, request: Request) -> None:
        """Take every sample of a row out, wherever it is."""
        for prefill in [p for p in (*self.waiting, *self.prefilling) if p.request is request]:
            held = prefill in self.prefilling
            (self.prefilling if held else self.waiting).remove(prefill)
            self._drop(prefill, held=held)
        for sample in [s for s in self.running if s.request is request]:
            self.finish(sample)

    # -- memory

    def _admit(self) -> None:
        num_pending = self._num_pending_tokens()
        num_promised = sum(prefill.num_tail_tokens for prefill in self.prefilling)
        while self.waiting and self._has_place(self.waiting[0], num_pending):
            if not self._try_admit(self.waiting[0], num_promised):
                if self.num_active:
                    return
                self._fail(self.waiting.popleft())
                continue
            admitted = self.waiting.popleft()
            self.prefilling.append(admitted)
            num_promised += admitted.num_tail_tokens
            num_pending += admitted.end.stop - (admitted.request.num_cached_tokens or 0)

    def _has_place(self, prefill: Prefill, num_pending: int) -> bool:
        """A row that generates takes a sequence of `max_num_seqs`, or more of them if it runs alone.

        A scored row is done as soon as it is fed: of these there are as many as fill the next step.
        """
        if prefill.request.is_scored:
            return max(num_pending, len(self.prefilling)) < self.max_num_batched_tokens
        num_generating = len(self.running) + sum(len(p.samples) for p in self.prefilling if not p.request.is_scored)
        return num_generating + len(prefill.samples) <= max(
            self.max_num_seqs, 0 if self.num_active else len(prefill.samples)
        )

    def _num_pending_tokens(self) -> int:
        """What admitted rows still have to compute."""
        nodes = {node for prefill in self.prefilling for node in prefill.end.path() if not node.is_computed}
        return sum(len(node) for node in nodes)

    def _try_admit(self, prefill: Prefill, num_promised: int) -> bool:
        """`num_promised`: the room that rows admitted before need for their first tails."""
        if prefill.end.is_computed and prefill.end.last_hidden is None:
            self._fork_end(prefill)
        try:
            num_cached = self.nodes.acquire(prefill.end)
        except KVMemoryExceeded:
            return False
        if not self.nodes.make_room(num_promised + prefill.num_tail_tokens):
            self.nodes.release(prefill.end)
            return False
        for _ in prefill.samples[1:]:
            self.nodes.acquire(prefill.end)
        if prefill.request.num_cached_tokens is None:
            prefill.request.num_cached_tokens = num_cached
        return True

    def _fork_end(self, prefill: Prefill) -> None:
        """The prompt ends inside a longer run that is already computed: its last token is computed again."""
        forked = self.nodes.fork_last_token(prefill.end)
        for sample in prefill.samples:
            self.nodes.add_row(forked)
            self.nodes.remove_row(sample.end)
            sample.end = forked
        prefill.end = forked

    def _fail(self, prefill: Prefill) -> None:
        """Alone, with everything else evicted, the row does not fit."""
        wanted = prefill.end.stop + prefill.num_tail_tokens
        self._drop(prefill, held=False)
        self.abort(prefill.request)
        message = (
            f"the row needs {wanted} tokens of KV memory, the limit is "
            f"{self.memory.budget_tokens} tokens (workers.kv_cache_memory_bytes)"
        )
        self._failed.append((prefill.request, RowError(RowErrorCode.ROW_OOM, message)))

    def _grow_tails(self) -> None:
        """Room for one more token a running sample; the latest rows give way to the earliest."""
        for sample in sorted(self.running, key=_age):
            while sample.tail is not None and sample.finish_reason is None:
                if self.nodes.make_room(self.memory.num_tokens_to_grow(sample.tail)):
                    self.memory.grow_tail(sample.tail)
                    break
                self._give_way(sample)

    def _open_tail(self, sample: Sample) -> bool:
        """False if the sample had to give way and waits again."""
        if not self.nodes.make_room(TAIL_CAPACITIES[0]):
            self._requeue(sample)
            return False
        sample.tail = self.memory.open_tail()
        return True

    def _give_way(self, sample: Sample) -> None:
        """Preempt the latest row, since eviction makes no room for `sample`; give up on this one if it is alone."""
        self._preempt(max([*self.running, *(s for p in self.prefilling for s in p.samples)], key=_age))
        if not self.num_active:
            self._fail(self._take_waiting(sample))

    def shrink_memory(self, budget_bytes: int) -> bool:
        """Have less KV memory from now on; the latest rows give way. False if the earliest alone needs more."""
        before = self.memory.budget_bytes
        self.memory.budget_bytes = budget_bytes
        while not self.nodes.make_room(0):
            held = [*self.running, *(s for p in self.prefilling for s in p.samples)]
            if len(held) < 2:
                self.memory.budget_bytes = before
                return False
            self._preempt(max(held, key=_age))
        self.memory.shrink(budget_bytes)
        return True

    def _preempt(self, sample: Sample) -> None:
        for prefill in [p for p in self.prefilling if sample in p.samples]:
            self.prefilling.remove(prefill)
            for _ in prefill.samples:
                self.nodes.release(prefill.end)
            self.waiting.appendleft(prefill)
            self.num_preemptions += 1
            return
        self.running.remove(sample)
        self._close(sample)
        self._requeue(sample)

    def _requeue(self, sample: Sample) -> None:
        """Wait again, to recompute what was generated, causally."""
        self.num_preemptions += 1
        request, old_end = sample.request, sample.end
        chain = _with_generated(request.segments, sample.token_ids)
        end = self.nodes.insert(chain, request.root)
        sample.end = end
        self.waiting.appendleft(self._prefill(request, [sample], end))
        self._leave(old_end, request)

    def _take_waiting(self, sample: Sample) -> Prefill:
        prefill = next(p for p in self.waiting if sample in p.samples)
        self.waiting.remove(prefill)
        return prefill

    # -- bookkeeping

    def _prefill(self, request: Request, samples: list[Sample], end: Node) -> Prefill:
        for _ in samples:
            self.nodes.add_row(end)
        return Prefill(request, samples, end)

    def _unscore(self, prefill: Prefill) -> None:
        if prefill.request.is_scored:
            self.nodes.remove_scored(prefill.end, prefill.request.num_prompt_tokens)

    def _drop(self, prefill: Prefill, *, held: bool) -> None:
        self._unscore(prefill)
        for _ in prefill.samples:
            if held:
                self._leave(prefill.end, prefill.request)
            else:
                self.nodes.remove_row(prefill.end)

    def _leave(self, end: Node, request: Request) -> None:
        """What stands under a root of its own is of no use to others."""
        self.nodes.release(end, keep_idle=request.root is None)
        self.nodes.remove_row(end)

    def _close(self, sample: Sample) -> None:
        if sample.tail is not None:
            self.memory.close_tail(sample.tail)
            sample.tail = None

    # -- the step

    def _new_nodes(self, budget: int) -> dict[Node, None]:
        """What to compute, in row order, until the budget is spent."""
        chosen: dict[Node, None] = {}
        for prefill in self.prefilling:
            for node in prefill.end.path():
                if node.is_computed or node in chosen:
                    continue
                piece = self._piece(node, budget, is_first=not chosen)
                if piece is None:
                    return chosen
                chosen[piece] = None
                budget -= len(piece)
                if piece is not node:
                    return chosen
        return chosen

    def _piece(self, node: Node, budget: int, *, is_first: bool) -> Node | None:
        """The node, or as much of a causal one as the budget holds. An atomic one may exceed it when it is first."""
        if len(node) <= budget or (node.bidirectional and is_first):
            return node
        if node.bidirectional or budget < (1 if is_first else MIN_PIECE_TOKENS):
            return None
        return self.nodes.split(node, budget)


def _is_complete(end: Node, in_step: Container[Node]) -> bool:
    return all(node.is_computed or node in in_step for node in end.path())


def _age(sample: Sample) -> tuple[int, int]:
    return (sample.request.order, sample.index)


def _with_generated(segments: Sequence[Segment], token_ids: Sequence[int]) -> tuple[Segment, ...]:
    """Generated tokens are causal, also when they follow a causal prompt as one run."""
    if segments and not segments[-1].bidirectional:
        return (*segments[:-1], Segment(segments[-1].token_ids + tuple(token_ids), False))
    return (*segments, Segment(tuple(token_ids), False))
