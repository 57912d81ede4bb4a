"""Who gives way when KV memory is short: the latest rows, for the earliest.

Knows the queues and what rows hold; no model.
"""

from segue.attention.tree.cache import NodeCache
from segue.workers.engine.queues import RowQueues
from segue.workers.engine.row_memory import RowMemory
from segue.workers.sampling.sample import Sample


class Preemption:
    """A preempted sample waits in front, and what it had generated is computed again as a part of its prompt."""

    def __init__(self, nodes: NodeCache, queues: RowQueues, rows: RowMemory) -> None:
        self._nodes = nodes
        self._queues = queues
        self._rows = rows
        self.num_preemptions = 0

    def grow_tails(self) -> None:
        """Room for one more token of each running sample that is still running then."""
        for sample in sorted(self._queues.running, key=_age):
            while sample.tail is not None and not self._rows.grow_tail(sample):
                self._preempt(self._latest())

    def shrink_memory(self, budget_bytes: int) -> bool:
        """Have less KV memory from now on. False, with nothing changed, if the earliest sample alone needs more."""
        memory = self._nodes.memory
        before, memory.budget_bytes = memory.budget_bytes, budget_bytes
        while not self._nodes.make_room(0):
            if len(self._queues.active) < 2:
                memory.budget_bytes = before
                return False
            self._preempt(self._latest())
        memory.shrink(budget_bytes)
        return True

    def keep_earliest(self) -> None:
        """All samples but the earliest give way."""
        while len(self._queues.active) > 1:
            self._preempt(self._latest())

    def _latest(self) -> Sample:
        return max(self._queues.active, key=_age)

    def _preempt(self, sample: Sample) -> None:
        queues = self._queues
        for prefill in [p for p in queues.prefilling if sample in p.samples]:
            queues.prefilling.remove(prefill)
            self._rows.let_go(prefill)
            self.num_preemptions += 1
            queues.waiting.appendleft(prefill)
            return
        queues.running.remove(sample)
        self.put_back(sample)

    def put_back(self, sample: Sample) -> None:
        """A sample that is in no queue waits again."""
        self.num_preemptions += 1
        self._queues.waiting.appendleft(self._rows.insert_again(sample))


def _age(sample: Sample) -> tuple[int, int]:
    return (sample.request.order, sample.index)
