"""What a step computes, and what it gave: the data that the scheduler, the runner and the core hand to each other.

Knows rows and nodes; computes nothing.
"""

from dataclasses import dataclass

from torch import Tensor

from segue.attention.memory.budget import TAIL_CAPACITIES
from segue.attention.tree.node import Node
from segue.workers.sampling.sample import Request, Sample
from segue.workers.scoring.likelihood import TokenScore


@dataclass(eq=False, slots=True)
class Prefill:
    """Samples that wait for the prompt ending at `end`: all of a new row's, or one that was preempted."""

    request: Request
    samples: list[Sample]
    end: Node

    @property
    def num_tail_tokens(self) -> int:
        """Memory to keep free for the tails with which its samples begin, once each has drawn its next token."""
        left = (sample.num_to_feed(len(sample.token_ids) + 1) for sample in self.samples)
        return sum(min(TAIL_CAPACITIES[0], number) for number in left)

    @property
    def num_least_tokens(self) -> int:
        """Memory without which not one of its samples gets any further."""
        return self.end.stop + min(1, self.num_tail_tokens)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one forward pass computes."""

    new_nodes: tuple[Node, ...]
    decoding: tuple[Sample, ...]
    complete: tuple[Prefill, ...]  # prompts that are computed after this step

    @property
    def is_empty(self) -> bool:
        return not (self.new_nodes or self.decoding or self.complete)

    @property
    def num_tokens(self) -> int:
        return len(self.decoding) + sum(map(len, self.new_nodes))

    @property
    def is_one_segment(self) -> bool:
        """Whether the step can have no less in it: an atomic segment and nothing else."""
        return not self.decoding and len(self.new_nodes) == 1 and self.new_nodes[0].bidirectional

    @property
    def ready(self) -> list[Prefill]:
        """Complete prompts whose samples draw their first token."""
        return [prefill for prefill in self.complete if prefill.request.is_generating]

    @property
    def scored(self) -> list[Prefill]:
        """Complete prompts of scored rows: only the last token of each continuation has no score yet."""
        return [prefill for prefill in self.complete if prefill.request.is_scored]

    @property
    def with_logits(self) -> list[Prefill]:
        """Complete prompts whose logits are the answer."""
        return [prefill for prefill in self.complete if prefill.request.wants_logits]

    @property
    def drawing(self) -> list[Sample]:
        """Samples that draw a token after this step."""
        return [*self.decoding, *(sample for prefill in self.ready for sample in prefill.samples)]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one forward pass gave. Lists are in the order of the plan's."""

    logits: Tensor | None  # [B, V] in the model's type, of `plan.drawing`; None if nothing is drawn
    last_scores: list[TokenScore]  # of the last token of each of `plan.scored`
    prompt_logits: list[Tensor]  # [V] fp32, of each of `plan.with_logits`
    num_scored_positions: int  # hidden states that went through the vocabulary for scores


@dataclass(frozen=True, slots=True)
class StepTooLarge:
    """The device had no memory for a step. Nothing was computed and nothing is lost: it can be planned again."""

    message: str  # of the device
