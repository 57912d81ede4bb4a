"""From examples to batches: which examples make a step, and which of them go through the model together.

A pure function of the seed and the step, so that a resumed training sees the same batches. Knows token counts; no
tensor, no model.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from random import Random

from segue.attention.segments import Segment, num_tokens
from segue.workers.training.params import TrainingParams

PASS_TOKENS = 64  # a forward and backward pass costs as much as so many tokens, beside those that it computes


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """A prompt, and the answer to learn."""

    segments: tuple[Segment, ...]  # canonical, under the mask of the training
    answer: tuple[int, ...]  # token ids, with the one that ends it

    @property
    def num_fed_tokens(self) -> int:
        """All tokens but the last, which is predicted and never fed."""
        return num_tokens(self.segments) + len(self.answer) - 1


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """The number of steps in an epoch. The last batch may be smaller."""
    return -(-num_examples // batch_size)


def num_steps(num_examples: int, params: TrainingParams) -> int:
    """The number of steps in a training that does not stop early."""
    steps = params.num_epochs * steps_per_epoch(num_examples, params.batch_size)
    return min(steps, params.max_steps or steps)


def batch_of_step(step: int, num_examples: int, batch_size: int, seed: int) -> list[int]:
    """The numbers of a step's examples. Every epoch has each example once, in an order of its own."""
    epoch, place = divmod(step, steps_per_epoch(num_examples, batch_size))
    return _order(num_examples, seed, epoch)[place * batch_size : (place + 1) * batch_size]


@functools.lru_cache(maxsize=2)
def _order(num_examples: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_examples))
    Random(f"segue:{seed}:{epoch}").shuffle(order)
    return order


def forward_passes(examples: Sequence[TrainingExample], max_tokens: int) -> list[list[TrainingExample]]:
    """Examples of about equal length together, at most `max_tokens` with padding. A longer example goes alone.

    Of all ways to cut the examples in order of length, this one costs least: all tokens, all padding, and PASS_TOKENS
    for each pass.
    """
    ordered = sorted(examples, key=lambda example: -example.num_fed_tokens)

    def padded(start: int, stop: int) -> int:
        return (stop - start) * ordered[start].num_fed_tokens

    best: list[tuple[int, int]] = [(0, 0)]  # for the first n examples: the least cost, and where their last pass starts
    for stop in range(1, len(ordered) + 1):
        earlier = takewhile(lambda start: padded(start, stop) <= max_tokens, range(stop - 2, -1, -1))  # noqa: B023
        starts = (stop - 1, *earlier)
        best.append(min((best[start][0] + padded(start, stop) + PASS_TOKENS, start) for start in starts))
    passes: list[list[TrainingExample]] = []
    stop = len(ordered)
    while stop:
        start = best[stop][1]
        passes.append(ordered[start:stop])
        stop = start
    return passes[::-1]
