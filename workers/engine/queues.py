"""Where every row of an engine stands: waiting, prefilling or running. Knows samples; no tree, no memory."""

from collections import deque
from collections.abc import Iterable

from segue.workers.engine.plan import Prefill
from segue.workers.sampling.sample import Request, Sample


class RowQueues:
    """A row waits, then its prompt is computed, then its samples run. A preempted sample waits again, in front."""

    def __init__(self) -> None:
        self.waiting: deque[Prefill] = deque()
        self.prefilling: list[Prefill] = []
        self.running: list[Sample] = []

    def clear(self) -> None:
        for queue in (self.waiting, self.prefilling, self.running):
            queue.clear()

    @property
    def is_empty(self) -> bool:
        return not (self.waiting or self.prefilling or self.running)

    @property
    def active(self) -> list[Sample]:
        """Samples that hold KV memory."""
        return [*self.running, *(sample for prefill in self.prefilling for sample in prefill.samples)]

    @property
    def num_generating(self) -> int:
        """Samples that take one of `max_num_seqs`: those of scored rows do not."""
        return len(self.running) + sum(len(p.samples) for p in self.prefilling if not p.request.is_scored)

    @property
    def requests(self) -> Iterable[Request]:
        """All rows, each once."""
        prefills = [*self.waiting, *self.prefilling]
        return dict.fromkeys([*(p.request for p in prefills), *(s.request for s in self.running)])

    @property
    def num_promised(self) -> int:
        """Tokens of memory that prefilling rows need for their first tails."""
        return sum(prefill.num_tail_tokens for prefill in self.prefilling)

    @property
    def num_pending(self) -> int:
        """Tokens that prefilling rows still have to compute."""
        nodes = {node for prefill in self.prefilling for node in prefill.end.path() if not node.is_computed}
        return sum(len(node) for node in nodes)
