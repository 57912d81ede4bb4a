"""The numbers that sampling and scoring want of logits, in few passes: the vocabulary is the longest dimension.

Shapes: `N` positions, `V` vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from segue.attention.cpu.kernels import DTYPES
from segue.workers.devices.devices import cpu_kernels

CACHED_ROWS = 16  # rows that are read several times should stay in the processor's cache


class Summary(NamedTuple):
    """For each position, `[N]`."""

    highest: Tensor  # fp32: the largest logit; NaN if any logit is NaN
    most_likely: Tensor  # int64: the token of the largest logit; of equal ones the first, as for argmax
    log_totals: Tensor  # fp32: `logit - highest - log_total` is a log-probability; empty unless wanted


def summarise(logits: Tensor, *, with_totals: bool = False) -> Summary:
    """The summary of logits `[N, V]` of any type."""
    kernels = cpu_kernels() if logits.device.type == "cpu" and logits.dtype in DTYPES else None
    if kernels is not None:
        return Summary(*kernels.summarise(logits, with_totals=with_totals))
    cached = logits.split(CACHED_ROWS) if logits.device.type == "cpu" else [logits]
    parts = [part.float() for part in cached]
    tops = [part.max(dim=-1) for part in parts]
    totals = [_log_total(*each) for each in zip(parts, tops, strict=True)] if with_totals else [torch.empty(0)]
    return Summary(torch.cat([top.values for top in tops]), torch.cat([top.indices for top in tops]), torch.cat(totals))


def _log_total(logits: Tensor, top: Any) -> Tensor:
    return (logits - top.values[:, None]).exp_().sum(dim=-1).log_()
