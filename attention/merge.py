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
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1))
    out.add_(part_out * (part_lse - total).exp_().unsqueeze(-1))
    lse.copy_(total)
