"""A row while it is in the engine: what it asked for, and the samples that are being drawn for it.

Knows tokens, parameters and where the prompt ends in the tree; no batch, no model.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from segue.attention.segments import Segment, num_tokens
from segue.attention.tree.node import Node
from segue.workers.errors import RowError
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import CompletionOutput, FinishReason, RequestOutput, Score, TokenLogprobs

if TYPE_CHECKING:
    from torch import Tensor

    from segue.attention.memory.budget import Tail
    from segue.workers.sampling.grammars import Grammar


@dataclass(eq=False, slots=True)
class Request:
    """One row. `random_key` and the seed, not the batch, decide what it draws."""

    request_id: Hashable
    segments: tuple[Segment, ...]  # canonical
    params: SamplingParams
    random_key: bytes
    order: int  # arrival; earlier rows are never preempted for later ones
    root: Node  # of the tree that its prompt is in
    continuation: tuple[int, ...] | None = None  # tokens to score after the prompt, instead of generating
    wants_logits: bool = False  # at the prompt's last token, instead of generating
    num_truncated_tokens: int = 0  # taken away from the beginning of the prompt
    num_cached_tokens: int | None = None  # known once admitted
    samples: list["Sample"] = field(default_factory=list)
    bad_words: tuple[tuple[int, ...], ...] = ()  # their tokens; known once the row is taken

    @property
    def num_drawn(self) -> int:
        """Samples to draw. Greedy samples are equal: one is drawn for all."""
        return 1 if self.params.temperature == 0 else self.params.n

    @property
    def is_scored(self) -> bool:
        return self.continuation is not None

    @property
    def is_generating(self) -> bool:
        return self.continuation is None and not self.wants_logits

    @property
    def last_continuation_token(self) -> int:
        """Scored, but not fed."""
        if self.continuation is None:
            raise ValueError("a row that is scored has a continuation")
        return self.continuation[-1]

    @property
    def num_prompt_tokens(self) -> int:
        return num_tokens(self.segments)

    @property
    def num_fed_tokens(self) -> int:
        """The prompt, and of a continuation all tokens but the last."""
        return self.num_prompt_tokens + max(0, len(self.continuation or ()) - 1)

    @property
    def prompt_token_ids(self) -> list[int]:
        return [token for segment in self.segments for token in segment.token_ids]

    @property
    def is_finished(self) -> bool:
        return all(sample.finish_reason for sample in self.samples)

    def answer(
        self,
        *,
        outputs: list[CompletionOutput] | None = None,
        score: Score | None = None,
        logits: "Tensor | None" = None,
    ) -> RequestOutput:
        """The answer to this row."""
        ids, num_scored = self._prompt()
        cached = self.num_cached_tokens or 0
        output = RequestOutput(self.request_id, ids, cached, outputs or [], score, None, num_scored, logits)
        output.num_truncated_tokens = self.num_truncated_tokens
        return output

    def failure(self, error: RowError) -> RequestOutput:
        """The answer to this row if it has none."""
        ids, num_scored = self._prompt()
        return RequestOutput(self.request_id, ids, 0, error=error, num_scored_prompt_tokens=num_scored)

    def _prompt(self) -> tuple[list[int], int | None]:
        return ([], self.num_fed_tokens) if self.is_scored else (self.prompt_token_ids, None)


@dataclass(eq=False, slots=True)
class Sample:
    """One answer being drawn. Its tokens since `end` live in `tail`; the last one is not fed yet."""

    request: Request
    index: int
    end: Node  # of the prompt, after preemption with the tokens generated until then
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    tail: "Tail | None" = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    text: str | None = None  # set when a stop string cut it
    grammar: "Grammar | None" = None  # from its first token on, if the answer must have a form

    def num_to_feed(self, num_drawn: int) -> int:
        """Once it has drawn so many tokens, the most that are still to be fed: the last of an answer is not."""
        return max(0, self.request.params.max_tokens - num_drawn) if self.request.is_generating else 0

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return self.request.num_prompt_tokens + len(self.token_ids)
