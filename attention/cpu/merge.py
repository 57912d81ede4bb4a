"""Attention over a union of disjoint key sets, from attention over each: the log-sum-exp merge, in fp32.

The idea is that of FlashAttention's split keys and of Hydragen's shared prefixes (arXiv 2402.05099).
"""

import torch
from torch import Tensor


def merge_part_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Add the keys of a part to what `out` and `lse` already cover, in place.

    out: `[..., D]` fp32; lse: `[...]` fp32, natural log. part_lse may be -inf (the part has no keys for that query; its
    part_out must then be finite), lse may not.
    """
    part_share = torch.sigmoid(part_lse - lse)  # exp(part) / (exp(lse) + exp(part))
    out.lerp_(part_out.to(out.dtype), part_share.unsqueeze(-1))
    torch.logaddexp(lse, part_lse, out=lse)
