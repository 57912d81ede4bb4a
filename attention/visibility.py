"""The rule as a dense mask: the reference backend and training use it.

    visible(q, k) = q - window < k <= q  or  segment(q) == segment(k), for bidirectional segments

A layer without a sliding window has no lower limit. A window never hides a query's own bidirectional segment: this is
the rule of transformers' `create_sliding_window_causal_mask(block_sequence_ids=...)`.

(MAS, "Segment-Based Attention Masking for GPTs", Katz et al., ACL 2025, arXiv 2412.18487.) Inference over the tree
needs no mask; tests compare it with this one.

Shapes: `T` tokens of a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from segue.attention.segments import Segment


def block_sequence_ids(segments: Sequence[Segment], num_generated: int = 0) -> Tensor:
    """`[T]`: of each token the number of its bidirectional segment, or -1 if it is causal, as in transformers."""
    ids: list[int] = []
    for number, segment in enumerate(segments):
        ids.extend([number if segment.bidirectional else -1] * len(segment))
    return torch.tensor(ids + [-1] * num_generated)


def visible(segment_ids: Tensor, window: int | None = None) -> Tensor:
    """segment_ids `[..., T]` -> bool `[..., T, T]`, `[q, k]`: may query q see key k."""
    positions = torch.arange(segment_ids.shape[-1], device=segment_ids.device)
    is_earlier = positions[None, :] <= positions[:, None]
    if window is not None:
        is_earlier &= is_in_window(positions, positions, window)
    is_same_block = (segment_ids[..., None, :] == segment_ids[..., :, None]) & (segment_ids[..., :, None] >= 0)
    return is_earlier | is_same_block


def is_in_window(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Positions of queries `[n]` and of keys `[K]` -> bool `[n, K]`: is the key among the query's last `window` tokens.

    A token is the last one of its own window.
    """
    return queries[:, None] - keys[None, :] < window
