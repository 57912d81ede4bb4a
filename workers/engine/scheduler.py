"""Which rows run, and which nodes and tokens the next step computes.

Rows run in the order given, which a plan makes depth-first. Every running sample decodes in every step; the rest of the
token budget goes to prefill. Bidirectional segments are prefilled as a whole. After a step that did not fit on the
device, steps are smaller for a while. Knows the tree and its memory; no model.
"""

from collections.abc import Container, Iterable

from segue.attention.tree.cache import NodeCache
from segue.attention.tree.node import Node
from segue.workers.engine.plan import Prefill, StepPlan
from segue.workers.engine.preemption import Preemption
from segue.workers.engine.queues import RowQueues
from segue.workers.engine.row_memory import RowMemory
from segue.workers.errors import RowError, RowErrorCode
from segue.workers.sampling.sample import Request, Sample

MIN_PIECE_TOKENS = 64  # a causal run is not cut for less: every cut is one more block in each later step
SHRUNK_SHARE = 0.75  # of its KV memory, what an engine keeps if its steps do not fit beside it
LEAST_KV_SHARE = 0.1  # of the KV memory it began with
FEW_TOKENS = 64  # a device without memory for a step of so many is of no use; a longer segment may be at fault itself
PATIENCE = 16  # good steps before limits are raised again; twice as many after each time that this was too early
MAX_PATIENCE = 1 << 14


class Scheduler:
    """Plans steps over one tree. A step has at most `max_num_batched_tokens`, or one longer atomic segment."""

    def __init__(self, nodes: NodeCache, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be at least max_num_seqs ({max_num_seqs}), got {max_num_batched_tokens}"
            )
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.step_tokens = max_num_batched_tokens  # fewer for a while after a step that did not fit on the device
        self.memory = nodes.memory
        self._most_kv_bytes = self.memory.budget_bytes
        self._is_one_by_one = False  # rows run alone for a while
        self._patience = PATIENCE
        self._num_good_steps = 0  # since a limit was changed
        self._has_raised = False  # a limit, since the last step that did not fit
        self._nodes = nodes
        self._queues = RowQueues()
        self._rows = RowMemory(nodes)
        self._preemption = Preemption(nodes, self._queues, self._rows)
        self._failed: list[tuple[Request, RowError]] = []

    @property
    def has_work(self) -> bool:
        return not self._queues.is_empty or bool(self._failed)

    @property
    def requests(self) -> Iterable[Request]:
        """All rows, each once."""
        return self._queues.requests

    @property
    def num_active(self) -> int:
        """Samples that hold KV memory."""
        return len(self._queues.active)

    @property
    def num_waiting(self) -> int:
        return len(self._queues.waiting)

    @property
    def num_preemptions(self) -> int:
        return self._preemption.num_preemptions

    # -- rows in and out

    def add(self, request: Request) -> None:
        """Queue a new row behind the others."""
        self._queues.waiting.append(self._rows.insert(request))

    def clear(self) -> None:
        """Forget all rows. The tree must forget them, too."""
        self._queues.clear()
        self._failed.clear()

    def start_decoding(self, prefill: Prefill) -> None:
        """The prompt is computed and every sample has drawn; samples that are not finished go on."""
        self._queues.prefilling.remove(prefill)
        for sample in prefill.samples:
            if sample.finish_reason:
                self._rows.drop_sample(sample)
            elif self._rows.open_tail(sample, is_alone=not self._queues.active):
                self._queues.running.append(sample)
            else:
                self._preemption.put_back(sample)

    def finish_prompt(self, prefill: Prefill) -> None:
        """The prompt is computed, and the row wants nothing more."""
        self._queues.prefilling.remove(prefill)
        self._rows.drop(prefill, held=True)

    def finish(self, sample: Sample) -> None:
        """A running sample is done."""
        self._queues.running.remove(sample)
        self._rows.drop_sample(sample)

    def abort(self, request: Request) -> None:
        """Take every sample of a row out, wherever it is."""
        queues = self._queues
        for queue, held in ((queues.waiting, False), (queues.prefilling, True)):
            for prefill in [prefill for prefill in queue if prefill.request is request]:
                queue.remove(prefill)
                self._rows.drop(prefill, held=held)
        for sample in [sample for sample in queues.running if sample.request is request]:
            self.finish(sample)

    def take_failed(self) -> list[tuple[Request, RowError]]:
        """Rows that have left since the last call because they can never fit."""
        failed, self._failed = self._failed, []
        return failed

    def _fail_or_grow(self, prefill: Prefill) -> None:
        """Alone, with everything else evicted, the row does not fit. Unless there is KV memory again that was given up
        for steps, all its samples leave."""
        if self._grow_memory(self._most_kv_bytes):
            return
        message = (
            f"the row needs {prefill.num_least_tokens} tokens of KV memory or more, the limit is "
            f"{self.memory.budget_tokens} tokens (workers.kv_cache_memory_bytes)"
        )
        self._fail(prefill.request, message)

    def _fail(self, request: Request, message: str) -> None:
        self.abort(request)
        self._failed.append((request, RowError(RowErrorCode.ROW_OOM, message)))

    # -- what to do when memory is short

    def make_room_for_steps(self, plan: StepPlan) -> bool:
        """After a step for which the device had no memory: smaller steps, then less KV memory. A row for which that is
        not enough, although it has the device to itself, fails.

        False if nothing can be made smaller any more. An empty plan: the device had no memory before there was a step.
        """
        if self._has_raised:
            self._patience = min(2 * self._patience, MAX_PATIENCE)
        self._has_raised, self._num_good_steps = False, 0
        smaller = min(plan.num_tokens or self.step_tokens, self.step_tokens) // 2
        if smaller and not plan.is_one_segment:
            self.step_tokens = smaller
            return True
        budget = int(self.memory.budget_bytes * SHRUNK_SHARE)
        is_least = budget < LEAST_KV_SHARE * self._most_kv_bytes
        if not is_least and self.shrink_memory(budget):
            return True
        if not self._is_one_by_one:
            self._is_one_by_one = True
            self._preemption.keep_earliest()
            return True
        return self._fail_the_one(plan, is_least=is_least)

    def _fail_the_one(self, plan: StepPlan, *, is_least: bool) -> bool:
        """The row that runs alone leaves: its segment is too long, or it needs the KV memory that its step lacks."""
        is_long = plan.is_one_segment and plan.num_tokens > FEW_TOKENS
        active = self._queues.active
        if not active or (is_least and not is_long):
            return False
        if is_long:  # what was given up did not help
            self._is_one_by_one = False
            self._grow_memory(self._most_kv_bytes)
        message = f"the device has no memory for a step of {plan.num_tokens} tokens, which cannot be fewer"
        self._fail(active[0].request, message)
        return True

    def note_good_step(self) -> None:
        """After some good steps, limits that were lowered are raised again, one after the other."""
        self._num_good_steps += 1
        if self._num_good_steps >= self._patience:
            self._num_good_steps = 0
            self._raise_a_limit()

    def _raise_a_limit(self) -> None:
        if self._is_one_by_one:
            self._is_one_by_one, self._has_raised = False, True
        elif self.step_tokens < self.max_num_batched_tokens:
            self.step_tokens = min(2 * self.step_tokens, self.max_num_batched_tokens)
            self._has_raised = True
        else:
            self._grow_memory(int(self.memory.budget_bytes / SHRUNK_SHARE))

    def _grow_memory(self, budget_bytes: int) -> bool:
        """Take back KV memory that was given up. False if there is none."""
        budget_bytes = min(budget_bytes, self._most_kv_bytes)
        has_grown = budget_bytes > self.memory.budget_bytes and self.memory.grow(budget_bytes)
        self._has_raised = self._has_raised or has_grown
        return has_grown

    def shrink_memory(self, budget_bytes: int) -> bool:
        """Have less KV memory from now on; the latest rows give way. False if the earliest alone needs more."""
        return self._preemption.shrink_memory(budget_bytes)

    # -- the next step

    def plan_step(self) -> StepPlan:
        """Grow tails, admit rows, fill the token budget. Rows that can never fit leave; see `take_failed`."""
        self._preemption.grow_tails()
        self._admit()
        is_short = self.step_tokens < self.max_num_batched_tokens
        decoding = tuple(self._queues.running[: self.step_tokens] if is_short else self._queues.running)
        new = self._new_nodes(self.step_tokens - len(decoding))
        if is_short and len(decoding) + sum(map(len, new)) > self.step_tokens:
            decoding = ()  # an atomic segment that is longer has the step to itself
        complete = tuple(prefill for prefill in self._queues.prefilling if _is_complete(prefill.end, new))
        return StepPlan(tuple(new), decoding, complete)

    def _admit(self) -> None:
        queues = self._queues
        if self._is_one_by_one and queues.active:
            return
        num_pending, num_promised = queues.num_pending, queues.num_promised
        while queues.waiting and self._has_place(queues.waiting[0], num_pending):
            prefill = queues.waiting[0]
            # Alone, a row that was preempted must find room wherever it would have had it before.
            wanted = num_promised + prefill.num_tail_tokens if queues.active else min(1, prefill.num_tail_tokens)
            if not self._rows.hold(prefill, wanted):
                if queues.active:
                    return
                self._fail_or_grow(prefill)
                continue
            queues.prefilling.append(queues.waiting.popleft())
            if self._is_one_by_one:
                return
            num_promised += prefill.num_tail_tokens
            num_pending += prefill.end.stop - (prefill.request.num_cached_tokens or 0)

    def _has_place(self, prefill: Prefill, num_pending: int) -> bool:
        """Whether a row may be admitted now.

        The samples of a row that generates take places of `max_num_seqs`; a row that runs alone may have more samples
        than that. A scored row is done as soon as it is fed: there may be as many as fill the next step.
        """
        queues = self._queues
        if prefill.request.is_scored:
            return max(num_pending, len(queues.prefilling)) < self.step_tokens
        num_samples = len(prefill.samples)
        return queues.num_generating + num_samples <= max(self.max_num_seqs, 0 if queues.active else num_samples)

    def _new_nodes(self, budget: int) -> dict[Node, None]:
        """What to compute, in row order, until the budget is spent."""
        chosen: dict[Node, None] = {}
        for prefill in self._queues.prefilling:
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
        return self._nodes.split(node, budget)


def _is_complete(end: Node, in_step: Container[Node]) -> bool:
    return all(node.is_computed or node in in_step for node in end.path())
