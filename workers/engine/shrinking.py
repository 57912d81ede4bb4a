"""What an engine does after a step for which its device had no memory: smaller steps, then less KV memory.

Knows the scheduler's limits; no model.
"""

import torch

from segue.workers.engine.plan import StepTooLarge
from segue.workers.engine.scheduler import Scheduler

SHRUNK_SHARE = 0.75  # of its KV memory, what an engine keeps if its steps do not fit beside it
LEAST_KV_SHARE = 0.1  # of the KV memory it began with


class Shrinking:
    """Makes the steps of one scheduler smaller."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._least_kv_bytes = int(scheduler.memory.budget_bytes * LEAST_KV_SHARE)

    def after(self, step: StepTooLarge) -> None:
        """Raises torch.OutOfMemoryError if nothing can be made smaller any more."""
        scheduler = self._scheduler
        smaller = max(step.num_tokens // 2, scheduler.max_num_seqs)
        if smaller < min(step.num_tokens, scheduler.max_num_batched_tokens):
            scheduler.max_num_batched_tokens = smaller
            return
        budget = int(scheduler.memory.budget_bytes * SHRUNK_SHARE)
        if budget < self._least_kv_bytes or not scheduler.shrink_memory(budget):
            raise torch.OutOfMemoryError(f"a step of {step.num_tokens} tokens does not fit: {step.message}")
