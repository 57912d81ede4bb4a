"""The backend for GPUs: every block of a step is one sequence of a variable-length attention call, and the parts of a
token are merged by log-sum-exp.

`torch.nn.attention.varlen.varlen_attn` takes sequences of queries that lie one after the other, and for each the place
of its first key (`cu_seq_k`) and the number of its keys (`seqused_k`). Keys lie in a pool (`attention/memory/pool.py`),
so that a block needs no copy of them and no table. A step makes two calls for each layer, however many rows it has: one
for the blocks that are not causal, in which the query heads of a key head are further queries, and one for causal
squares. Where a sliding window hides keys there is a third, for squares whose queries leave one key more behind each.

Traps (torch 2.13): the log-sum-exp is natural and `[H, T]`, whatever the docstring says; over no keys it is +inf, so no
sequence is empty here; causal squares are aligned at the bottom right; fp16 and bf16 only.

Shapes: `T` packed tokens, `H = Hkv * G` query heads, `D` head width, `N` sequences, `Q` their queries (a token occurs
once for each block that it is in), `M` most parts of a token.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segue.attention.backend import LayerAttention, check_step
from segue.attention.cuda.plan import CudaPlan, Sequences
from segue.attention.memory.budget import KVMemory, KVShape, Tail
from segue.attention.memory.pool import KVPool
from segue.attention.tree.blocks import StepBlocks

FLASH_DTYPES = (torch.float16, torch.bfloat16)

LEAVING = (0, -1)  # the window of a square, aligned at the bottom right: query `i` sees the keys from number `i` on

Kernel = Callable[..., tuple[Tensor, Tensor]]


@cache
def cuda_kernel() -> Kernel:
    """torch's own, which returns the log-sum-exp beside the output.

    `num_splits=1`: the order of a sum must not depend on the batch, and torch must not choose another kernel.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    if "seqused_k" not in inspect.signature(varlen_attn).parameters:
        return _older_kernel

    def kernel(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, lse = varlen_attn(*args, return_aux=AuxRequest(lse=True), num_splits=1, **kwargs)
        return out, lse

    return kernel


def _older_kernel(
    *args: Any,
    scale: float,
    seqused_k: Tensor,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,  # found out by the kernel
) -> tuple[Tensor, Tensor]:
    """What torch 2.13's varlen_attn calls. torch 2.11 and 2.12 have the kernel, but no public function that takes keys
    which begin anywhere."""
    return torch.ops.aten._flash_attention_forward(
        *args,
        0.0,
        window_size == (-1, 0),
        False,
        scale=scale,
        window_size_left=window_size[0],
        window_size_right=window_size[1],
        seqused_k=seqused_k,
    )[:2]


class CudaBackend:
    """Computes a step's blocks with two calls for each layer. `kernel`: for tests, which have no GPU."""

    def __init__(self, kernel: Kernel | None = None, layer_devices: Sequence[torch.device] | None = None) -> None:
        self._kernel = kernel
        self._layer_devices = layer_devices

    def new_memory(self, shape: KVShape, budget_bytes: int) -> KVPool:
        """Raises ValueError for a device or a type that the kernel does not compute."""
        if self._kernel is None and (shape.device.type != "cuda" or shape.dtype not in FLASH_DTYPES):
            raise ValueError(
                f"backend varlen wants a CUDA device and float16 or bfloat16, got {shape.device.type} and {shape.dtype}"
            )
        return KVPool(shape, budget_bytes, self._layer_devices)

    def begin(self, blocks: StepBlocks, tails: Sequence[Tail], memory: KVMemory) -> "_CudaStep":
        if not isinstance(memory, KVPool):
            raise TypeError(f"wanted a pool, got {type(memory).__name__}")
        return _CudaStep(blocks, tails, memory, self.kernel)

    @property
    def kernel(self) -> Kernel:
        return self._kernel or cuda_kernel()


class _CudaStep:
    """A plan for each sliding window, and its copies on the devices of the layers."""

    def __init__(self, blocks: StepBlocks, tails: Sequence[Tail], pool: KVPool, kernel: Kernel) -> None:
        self._blocks = blocks
        self._tails = tails
        self._longest = max(blocks.position_ids, default=-1) + 1
        self._pool = pool
        self._kernel = kernel
        self._on: dict[tuple[int | None, torch.device], PlanTensors] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention) -> Tensor:
        """query `[H, T, D]`, key and value `[Hkv, T, D]` -> `[T, H, D]`."""
        check_step(self._pool.shape, self._blocks.num_tokens, layer, query, key, value)
        on = self._on_device(how.window, query.device)
        return attend(on, self._kernel, self._pool.tensors[layer], query, key, value, how)

    def _on_device(self, window: int | None, device: torch.device) -> "PlanTensors":
        """A window that is longer than every row hides nothing."""
        window = window if window is not None and window < self._longest else None
        if (window, device) not in self._on:
            self._on[window, device] = PlanTensors(CudaPlan.of(self._blocks, self._tails, window), device)
        return self._on[window, device]

    def finish(self) -> None:
        """All keys and values are where they stay."""


def attend(
    on: "PlanTensors", kernel: Kernel, pool: Tensor, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention
) -> Tensor:
    """pool `[2, P, Hkv, D]`, query `[H, T, D]`, key and value `[Hkv, T, D]` -> `[T, H, D]`.

    Raises ValueError for capped scores, which the kernel does not compute.
    """
    if how.softcap is not None:
        raise ValueError(f"torch's variable-length kernel does not cap scores, wanted a softcap of {how.softcap}")
    keys, values = pool
    keys.index_copy_(0, on.slots, key.transpose(0, 1))
    values.index_copy_(0, on.slots, value.transpose(0, 1))
    num_heads, num_tokens, head_dim = query.shape
    num_kv_heads = key.shape[0]
    tokens = query.transpose(0, 1)  # [T, H, D]
    grouped = tokens.unflatten(1, (num_kv_heads, -1)).transpose(1, 2)  # [T, G, Hkv, D]
    outs, totals = zip(
        _dense(kernel, on.dense, grouped, keys, values, how.scale),
        *(
            _square(kernel, call, tokens, keys, values, how.scale, window)
            for call, window in ((on.causal, on.causal_window), (on.leaving, LEAVING))
            if call.num_queries
        ),
        strict=True,
    )
    sinks = None if how.sinks is None else how.sinks.view(num_kv_heads, -1).T  # [G, Hkv]
    merged = _merged(on.parts, torch.cat(outs), torch.cat(totals), sinks)  # [T, G, Hkv, D]
    return merged.transpose(1, 2).reshape(num_tokens, num_heads, head_dim).to(query.dtype)


def _dense(
    kernel: Kernel, call: "_Call", grouped: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """-> (`[Q, G, Hkv, D]`, LSE `[Q, G, Hkv]`)"""
    groups, num_kv_heads = grouped.shape[1:3]
    if not call.num_queries:
        return grouped.new_empty(0, *grouped.shape[1:]), grouped.new_empty(0, groups, num_kv_heads).float()
    queries = grouped.index_select(0, call.queries).flatten(0, 1)  # [Q * G, Hkv, D]
    out, lse = kernel(
        queries,
        keys,
        values,
        call.cu_seq_q * groups,
        call.starts_k,
        call.max_q * groups,
        call.max_k,
        scale=scale,
        seqused_k=call.seqused_k,
    )
    return out.unflatten(0, (-1, groups)), lse.transpose(0, 1).unflatten(0, (-1, groups))


def _square(
    kernel: Kernel, call: "_Call", tokens: Tensor, keys: Tensor, values: Tensor, scale: float, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """-> (`[Q, G, Hkv, D]`, LSE `[Q, G, Hkv]`)"""
    out, lse = kernel(
        tokens.index_select(0, call.queries),
        keys,
        values,
        call.cu_seq_q,
        call.starts_k,
        call.max_q,
        call.max_k,
        scale=scale,
        window_size=window,
        enable_gqa=True,
        seqused_k=call.seqused_k,
    )
    heads = (keys.shape[1], -1)  # [Hkv, G]
    return out.unflatten(1, heads).transpose(1, 2), lse.transpose(0, 1).unflatten(1, heads).transpose(1, 2)


class PlanTensors:
    """A plan on a device."""

    def __init__(self, plan: CudaPlan, device: torch.device) -> None:
        self.slots = _sent(plan.slots, device)
        self.dense = _Call(plan.dense, device)
        self.causal = _Call(plan.causal, device)
        self.causal_window = (-1 if plan.window is None else plan.window - 1, 0)
        self.leaving = _Call(plan.leaving, device)
        self.parts = _sent(plan.parts, device)


class _Call:
    def __init__(self, sequences: Sequences, device: torch.device) -> None:
        self.num_queries = len(sequences.queries)
        self.max_q, self.max_k = sequences.max_q, sequences.max_k
        if self.num_queries:
            self.queries = _sent(sequences.queries, device)
            self.cu_seq_q = _sent(sequences.cu_seq_q, device)
            self.starts_k = _sent(sequences.starts_k, device)
            self.seqused_k = _sent(sequences.seqused_k, device)


def _merged(parts: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """parts `[T, M]`, out `[Q, G, Hkv, D]`, lse `[Q, G, Hkv]`, sinks `[G, Hkv]` -> `[T, G, Hkv, D]` fp32.

    The number `Q` stands for no part: its weight is 0. A sink is one more part, whose values are 0.
    """
    if parts.shape[1] == 1 and sinks is None:
        return out.index_select(0, parts[:, 0]).float()
    none = lse.new_full((1, *lse.shape[1:]), -torch.inf)
    totals = torch.cat([lse, none])[parts]  # [T, M, G, Hkv]
    if sinks is not None:
        totals = torch.cat([totals, sinks.expand(len(totals), 1, -1, -1)], dim=1)
    weights = totals.softmax(dim=1)
    rows = parts.remainder(len(out))  # "none" reads part 0, whose numbers are finite: 0 times garbage may be garbage
    merged = out[rows[:, 0]].float().mul_(weights[:, 0, ..., None])
    for part in range(1, parts.shape[1]):  # the sink's weight, behind them, has no values
        merged.addcmul_(out[rows[:, part]], weights[:, part, ..., None])
    return merged


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
