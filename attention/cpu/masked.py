"""Attention of some queries over some keys by plain products, for what torch's flash attention cannot compute.

These are blocks in which a sliding window hides other keys from each query, and capped scores.

Shapes: `n` queries, `K` keys, `G` query heads a key head, `D` head width.
"""

import torch
from torch import Tensor

from segue.attention.backend import LayerAttention

MAX_PAIRS = 1 << 20  # of a query and a key, whose scores are in memory at once for each head


def attend_masked(
    queries: Tensor, key: Tensor, value: Tensor, how: LayerAttention, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`[Hkv, n, G, D]` over `[Hkv, K, D]` -> (`[Hkv, n, G, D]` fp32, LSE `[Hkv, n, G]`).

    `seen`, bool `[n, K]`: which keys a query sees; None means all. Without any its output is 0 and its LSE is -inf.
    """
    some = max(1, MAX_PAIRS // key.shape[1])
    starts = range(0, queries.shape[1], some)
    parts = [
        _attend(queries[:, start : start + some], key, value, how, None if seen is None else seen[start : start + some])
        for start in starts
    ]
    outs, totals = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(totals, dim=1)


def _attend(
    queries: Tensor, key: Tensor, value: Tensor, how: LayerAttention, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    query = queries.float().flatten(1, 2)  # [Hkv, n * G, D]
    scores = query @ key.float().transpose(1, 2) * how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    if seen is not None:
        scores = scores.masked_fill(~seen.repeat_interleave(queries.shape[2], dim=0), -torch.inf)
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return (weights @ value.float()).view(queries.shape), lse.view(queries.shape[:-1])
