"""A row in the engine: what was asked, what was drawn so far, and what comes out.

Outputs have vLLM's shape and names. Knows tokens and parameters; no tensor, no text, no scheduler.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from segue.attention.segments import Segment, num_tokens
from segue.attention.tree.tree import Node
from segue.workers.errors import RowError
from segue.workers.rows.params import SamplingParams

if TYPE_CHECKING:
    from segue.attention.memory.budget import Tail  # it imports torch, which planning does not need
    from segue.workers.sampling.grammars import Grammar

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt to answer."""

    segments: Sequence[Segment]
    params: SamplingParams
    random_key: bytes  # names the row for its draws


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """Tokens to score after a context."""

    context: Sequence[Segment]
    continuation: tuple[int, ...]
    is_shared: bool = True  # may others have its beginning

    @property
    def fed_segments(self) -> list[Segment]:
        """Context and continuation without the last token, which is scored but not fed; not canonical."""
        return [*self.context, Segment(self.continuation[:-1], False)]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one generated token, under the model's own distribution (before temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely tokens, best first


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a row."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it; None for end-of-sequence
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """The log-likelihood of a continuation, with lm-evaluation-harness' meaning."""

    logprob: float  # natural log, summed over the continuation's tokens
    num_tokens: int
    is_greedy: bool  # every token is the most likely one


@dataclass(slots=True)
class RequestOutput:
    """The answer to one row. `error` is set, and `outputs` empty, when there is none."""

    request_id: Hashable
    prompt_token_ids: list[int]  # empty for a scored row: there may be hundreds over one long context
    num_cached_tokens: int  # prompt tokens whose keys were there, or were being made by another row
    outputs: list[CompletionOutput] = field(default_factory=list)
    score: Score | None = None  # of the given continuation, if the request had one
    error: RowError | None = None
    num_scored_prompt_tokens: int | None = None  # of a scored row: context, and continuation without its last token

    @property
    def num_prompt_tokens(self) -> int:
        """What was to be fed, generated tokens aside."""
        return len(self.prompt_token_ids) if self.num_scored_prompt_tokens is None else self.num_scored_prompt_tokens


@dataclass(eq=False, slots=True)
class Request:
    """One row. `random_key` and the seed, not the batch, decide what it draws."""

    request_id: Hashable
    segments: tuple[Segment, ...]  # canonical
    params: SamplingParams
    random_key: bytes
    order: int  # arrival; earlier rows are never preempted for later ones
    root: Node | None = None  # a tree of its own, for a row that shares nothing
    continuation: tuple[int, ...] | None = None  # tokens to score after the prompt, instead of generating
    num_cached_tokens: int | None = None  # known once admitted
    samples: list["Sample"] = field(default_factory=list)

    @property
    def is_scored(self) -> bool:
        return self.continuation is not None

    @property
    def num_prompt_tokens(self) -> int:
        return num_tokens(self.segments)

    @property
    def num_fed_tokens(self) -> int:
        """The prompt, and of a continuation all but the last token."""
        return self.num_prompt_tokens + max(0, len(self.continuation or ()) - 1)

    @property
    def prompt_token_ids(self) -> list[int]:
        return [token for segment in self.segments for token in segment.token_ids]

    def output(
        self,
        *,
        num_cached_tokens: int = 0,
        outputs: "list[CompletionOutput] | None" = None,
        score: "Score | None" = None,
        error: RowError | None = None,
    ) -> "RequestOutput":
        """The answer to this row."""
        ids, num_scored = ([], self.num_fed_tokens) if self.is_scored else (self.prompt_token_ids, None)
        return RequestOutput(self.request_id, ids, num_cached_tokens, outputs or [], score, error, num_scored)

    @property
    def is_finished(self) -> bool:
        return all(sample.finish_reason for sample in self.samples)


@dataclass(eq=False, slots=True)
class Sample:
    """One answer being drawn. Its tokens since `end` live in `tail`; the last one is not fed yet."""

    request: Request
    index: int
    end: Node  # of the prompt, after preemption with the tokens generated until then; without what `tail` has of it
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    tail: "Tail | None" = None
    copied: Node | None = None  # where the prompt ends whose last nodes `tail` has, too
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    text: str | None = None  # set when a stop string cut it
    grammar: "Grammar | None" = None  # from its first token on, if it must have a form

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return self.request.num_prompt_tokens + len(self.token_ids)
