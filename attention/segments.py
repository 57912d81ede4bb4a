"""A prompt as a chain of segments. A segment is what a token can see, and what is reused.

Knows token ids only: no text, no model, no tensor.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive prompt tokens that share one attention rule.

    In a bidirectional segment every token sees every other (MAS, arXiv 2412.18487). In a causal one a token sees itself
    and the tokens before it. Every token sees all earlier segments of its row.
    """

    token_ids: tuple[int, ...]
    bidirectional: bool

    def __len__(self) -> int:
        return len(self.token_ids)


def canonical_segments(segments: Iterable[Segment], *, mask: str) -> tuple[Segment, ...]:
    """The same visibility in the shortest form: no empty segments, neighbouring causal segments merged.

    `mask="causal"` makes every segment causal, so that a prompt becomes one causal run. A bidirectional segment of one
    token sees exactly what a causal one sees. It stays a segment of its own all the same, whose keys are shared as a
    whole.
    """
    if mask not in ("segment", "causal"):
        raise ValueError(f"mask must be 'segment' or 'causal', got {mask!r}")
    runs: list[Segment] = []
    for segment in segments:
        bidirectional = segment.bidirectional and mask == "segment"
        if not segment.token_ids:
            continue
        if runs and not bidirectional and not runs[-1].bidirectional:
            runs[-1] = Segment(runs[-1].token_ids + tuple(segment.token_ids), False)
        else:
            runs.append(Segment(tuple(segment.token_ids), bidirectional))
    return tuple(runs)


def first_tokens(segments: Sequence[Segment], count: int) -> tuple[Segment, ...]:
    """The chain up to its first `count` tokens; a cut must lie in a causal segment, or at a border."""
    kept: list[Segment] = []
    for segment in segments:
        if count <= 0:
            break
        if segment.bidirectional and len(segment) > count:
            raise ValueError("a bidirectional segment is atomic and cannot be cut")
        kept.append(Segment(segment.token_ids[:count], segment.bidirectional))
        count -= len(segment)
    return tuple(kept)


def last_tokens(segments: Sequence[Segment], count: int) -> tuple[Segment, ...]:
    """The chain's last `count` tokens. Of a segment that the cut falls into, the end stays, and its attention rule."""
    kept: list[Segment] = []
    for segment in reversed(segments):
        if count <= 0:
            break
        kept.append(Segment(segment.token_ids[-count:], segment.bidirectional))
        count -= len(segment)
    return tuple(reversed(kept))


def num_tokens(segments: Sequence[Segment]) -> int:
    """Tokens of a whole chain."""
    return sum(len(segment) for segment in segments)
