"""What a row asks of an engine, and the answer it gets.

Outputs have vLLM's shape and names. Knows tokens and parameters; no text, no tree, no scheduler. The internal state of
a row in the engine is in `workers/sampling/sample.py`.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from segue.attention.segments import Segment
from segue.workers.errors import RowError
from segue.workers.rows.params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor  # planning does without torch

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt to answer."""

    segments: Sequence[Segment]
    params: SamplingParams
    random_key: bytes  # names the row for its draws; empty if a seed of its own decides them alone


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """Tokens to score after a context."""

    context: Sequence[Segment]
    continuation: tuple[int, ...]
    is_shared: bool = True  # whether other rows may share its beginning

    @property
    def fed_segments(self) -> list[Segment]:
        """Context and continuation without the last token, which is scored but not fed; not canonical."""
        return [*self.context, Segment(self.continuation[:-1], False)]


@dataclass(frozen=True, slots=True)
class LogitsRequest:
    """A prompt whose logits at the last token are wanted; nothing is generated."""

    segments: Sequence[Segment]


EngineRow = GenerationRequest | ScoringRequest  # what rows of a job may be


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
    ends_inside_character: bool = False  # its last tokens begin a character, which `text` does not have


@dataclass(frozen=True, slots=True)
class Score:
    """The log-likelihood of a continuation, with lm-evaluation-harness' meaning."""

    logprob: float  # natural log, summed over the continuation's tokens
    num_tokens: int
    is_greedy: bool  # every token is the most likely one


@dataclass(slots=True)
class RequestOutput:
    """The answer to one row. If there is none, `error` is set and `outputs` is empty."""

    request_id: Hashable
    prompt_token_ids: list[int]  # empty for a scored row: there may be hundreds over one long context
    num_cached_tokens: int  # prompt tokens whose keys were there, or were being made by another row
    outputs: list[CompletionOutput] = field(default_factory=list)
    score: Score | None = None  # of a ScoringRequest
    error: RowError | None = None
    num_scored_prompt_tokens: int | None = None  # of a scored row: context, and continuation without its last token
    logits: "Tensor | None" = None  # of a LogitsRequest: [V] fp32
    num_truncated_tokens: int = 0  # of the prompt's beginning, by truncate_prompt_tokens; not in prompt_token_ids
    prompt: str | None = None  # the text that was given to the engine; None for chats, token ids and segments

    @property
    def num_prompt_tokens(self) -> int:
        """The tokens to feed, generated ones not counted."""
        return len(self.prompt_token_ids) if self.num_scored_prompt_tokens is None else self.num_scored_prompt_tokens
