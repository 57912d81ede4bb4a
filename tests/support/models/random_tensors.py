"""Random numbers that are the same in each run."""

import torch


def randn(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normally distributed; the seed is the sum of the sizes."""
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)
