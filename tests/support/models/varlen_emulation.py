"""`torch.nn.attention.varlen.varlen_attn` on a CPU: the same arguments, the same results, the same ways to fail.

What it knows of the bundled FlashAttention 2 is from torch's source and was compared on a card (tests/gpu/test_gpu.py):
keys of sequence `i` begin at `cu_seq_k[i]`, `seqused_k[i]` of them count, whatever lies behind them; a causal square is
aligned at the bottom right; the log-sum-exp is natural, `[H, T]`, and +inf over no keys.
"""

import inspect
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from segue.attention.cuda.backend import CudaBackend
from segue.attention.memory.budget import KVShape
from segue.attention.memory.pool import KVPool
from segue.workers.devices import devices

MAX_POOL_BYTES = 64 << 20

PARAMETERS = inspect.signature(varlen.varlen_attn).parameters


def emulated_kernel(*args, **kwargs) -> tuple[Tensor, Tensor]:
    """What `cuda_kernel` of the CUDA backend returns. Raises TypeError for arguments that torch does not have."""
    inspect.signature(varlen.varlen_attn).bind(*args, num_splits=1, **kwargs)
    return emulated_varlen_attn(*args, **kwargs)


class EmulatedBackend(CudaBackend):
    """On a CPU, in a pool that is small, since it is allocated at once, and full of what must never count."""

    def __init__(self, layer_devices: Sequence[torch.device] | None = None) -> None:
        super().__init__(emulated_kernel, layer_devices)

    def new_memory(self, shape: KVShape, budget_bytes: int) -> KVPool:
        pool = super().new_memory(shape, min(budget_bytes, MAX_POOL_BYTES))
        for tensor in pool.tensors:
            tensor.fill_(torch.nan)
        return pool


def emulate(patch: pytest.MonkeyPatch) -> None:
    """What "auto" chooses on a CPU is this backend."""
    for name in ("cpu", "native"):
        patch.setitem(devices.BACKENDS, name, EmulatedBackend)


def emulated_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """query `[Tq, H, D]`, key and value `[Tk, Hkv, D]` -> (`[Tq, H, D]`, LSE `[H, Tq]` fp32)."""
    num_sequences = len(cu_seq_q) - 1
    _check(query, key, value, cu_seq_q, cu_seq_k, seqused_k, num_sequences)
    if enable_gqa != (query.shape[1] != key.shape[1]) and not enable_gqa:
        raise ValueError(f"Expect query and key/value to have the same number of heads, got {query.shape[1]}")
    if query.shape[1] % key.shape[1]:
        raise ValueError("Expect number of query heads to be a multiple of kv heads for GQA")
    groups = query.shape[1] // key.shape[1]
    out = torch.full_like(query, torch.nan)  # what no sequence covers is garbage
    lse = query.new_full((query.shape[1], len(query)), torch.nan, dtype=torch.float32)
    borders_q, borders_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    used = seqused_k.tolist() if seqused_k is not None else None
    grouped = query.unflatten(1, (-1, groups)).permute(1, 2, 0, 3)  # [Hkv, G, Tq, D]
    for index in range(num_sequences):
        first, last = borders_q[index], borders_q[index + 1]
        start = borders_k[index]
        length = used[index] if used is not None else borders_k[index + 1] - start
        if last - first > max_q or length > max_k:
            raise ValueError(f"sequence {index} has {last - first} queries and {length} keys, told {max_q}, {max_k}")
        if start < 0 or start + length > len(key):
            raise ValueError(f"sequence {index} reads keys {start} to {start + length} of {len(key)}: illegal memory")
        if first == last:
            continue
        k, v = (part[start : start + length].transpose(0, 1)[:, None].float() for part in (key, value))
        scores = grouped[:, :, first:last].float() @ k.transpose(2, 3) * scale  # [Hkv, G, q, k]
        scores = scores.masked_fill(_outside(window_size, last - first, length), -torch.inf)
        weights = scores.softmax(dim=-1).nan_to_num()  # over no keys: zeros
        out[first:last] = (weights @ v).flatten(0, 1).transpose(0, 1).to(out.dtype)
        total = scores.logsumexp(dim=-1).flatten(0, 1)
        lse[:, first:last] = torch.where(total == -torch.inf, torch.inf, total)
    return out, lse


def _outside(window_size: tuple[int, int], num_queries: int, num_keys: int) -> Tensor:
    """bool `[q, k]`: what a window hides, aligned at the bottom right. -1 is no limit on that side."""
    left, right = window_size
    distance = torch.arange(num_keys) - torch.arange(num_keys - num_queries, num_keys)[:, None]
    hidden = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    return hidden


def _check(query, key, value, cu_seq_q, cu_seq_k, seqused_k, num_sequences) -> None:
    """What mha_varlen_fwd checks (pytorch, aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp)."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise RuntimeError(f"{name} must have 3 dimensions, got {tensor.dim()}")
        if tensor.stride(-1) != 1:
            raise RuntimeError(f"{name}: input tensor must have contiguous last dimension")
        if tensor.shape[-1] % 8:
            raise RuntimeError(f"{name}: head_size should be a multiple of 8, got {tensor.shape[-1]}")
    for name, tensor in (("cu_seq_q", cu_seq_q), ("cu_seq_k", cu_seq_k)):
        if tensor.dtype != torch.int32 or tensor.shape != (num_sequences + 1,) or not tensor.is_contiguous():
            raise RuntimeError(f"{name} must have dtype int32 and shape ({num_sequences + 1},)")
    if seqused_k is not None and (seqused_k.dtype != torch.int32 or seqused_k.shape != (num_sequences,)):
        raise RuntimeError(f"seqused_k must have dtype int32 and shape ({num_sequences},)")
    if key.shape != value.shape or key.dtype != query.dtype:
        raise RuntimeError("query, key and value must have the same dtype, key and value the same shape")
