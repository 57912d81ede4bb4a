"""The processes of one training: which one this is, and sums over all of them. Knows torch.distributed; no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """`size` processes that have the same weights. One alone needs no process group."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over all processes, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over all processes."""
        total = torch.tensor(values, dtype=torch.float64)
        self.sum_([total])
        return total.tolist()
