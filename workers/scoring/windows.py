"""A text longer than a model's context is scored in windows, each token once.

Knows token ids and scores; no model, no text.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

from segue.attention.segments import Segment
from segue.workers.rows.request import Score, ScoringRequest


def rolling_windows(
    token_ids: Sequence[int], prefix_token_id: int, max_length: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(context, continuation) pairs that predict each token of a text once, each with at least one token of context.

    They are those of lm-evaluation-harness' `get_rolling_token_windows` with `context_len=1`, made disjoint: every
    window but the last has new tokens only, and the last one is filled up with context.
    """
    tokens = tuple(token_ids)
    first = min(max_length, len(tokens))
    if first:
        yield (prefix_token_id,), tokens[:first]
    predicted = first
    while predicted < len(tokens):
        count = min(len(tokens) - predicted, max_length)
        stop = predicted + count
        start = max(0, stop - max_length - 1)
        yield tokens[start:predicted], tokens[predicted:stop]
        predicted = stop


def rolling_requests(token_ids: Sequence[int], prefix_token_id: int, max_length: int) -> Iterator[ScoringRequest]:
    """The windows of a text. Only the first one begins as another text may begin, so only it is shared."""
    for number, (context, continuation) in enumerate(rolling_windows(token_ids, prefix_token_id, max_length)):
        yield ScoringRequest((Segment(context, False),), continuation, is_shared=number == 0)


def total_score(scores: Iterable[Score]) -> Score:
    """The score of a text from those of its consecutive pieces."""
    pieces = list(scores)
    return Score(
        math.fsum(piece.logprob for piece in pieces),
        sum(piece.num_tokens for piece in pieces),
        all(piece.is_greedy for piece in pieces),
    )
