"""Steps of decoding rows alone, padded to a few sizes, since a CUDA graph replays the same calls on the same addresses.

Padding queries have no keys, and padding keys go to the pool's scratch place. Knows plans and the pool; no model and no
graph.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from segue.attention.backend import LayerAttention
from segue.attention.cuda.backend import Kernel, PlanTensors, attend
from segue.attention.cuda.plan import KEY_TILE, QUERY_TILE, CudaPlan, Sequences
from segue.attention.memory.pool import KVPool


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """The rounded sizes of a step of decoding rows."""

    rows: int
    sequences: int
    queries: int
    parts: int

    @classmethod
    def of(cls, plan: CudaPlan) -> "DecodeBucket":
        """Raises ValueError for a step that computes nodes."""
        if len(plan.causal.queries):
            raise ValueError("wanted a step of decoding rows alone, got one that computes nodes")
        rows, sequences, queries = plan.num_tokens, len(plan.dense.seqused_k), len(plan.dense.queries)
        parts = plan.parts.shape[1] + plan.parts.shape[1] % 2
        return cls(_rounded(rows), _rounded(sequences), _rounded(queries), parts)


def _rounded(number: int) -> int:
    """Up to a power of two, or one and a half times one."""
    power = 1 << max(0, number - 1).bit_length()
    return power * 3 // 4 if power >= 4 and number <= power * 3 // 4 else power


class PaddedDecode:
    """A step in tensors of rounded sizes, which later steps of about that size fill again. The hidden states of padding
    rows have no meaning."""

    def __init__(self, bucket: DecodeBucket, pool: KVPool, kernel: Kernel) -> None:
        self._pool = pool
        self._kernel = kernel
        self._bucket = bucket
        self._on = PlanTensors(_padding(bucket, pool.scratch), pool.tensors[0].device)

    def load(self, plan: CudaPlan) -> None:
        """Fill in the next step. Raises ValueError for a step of another bucket."""
        if DecodeBucket.of(plan) != self._bucket:
            raise ValueError(f"a step of {DecodeBucket.of(plan)} does not fit {self._bucket}")
        on, pool = self._on, self._pool
        _refill(on.slots, plan.slots, pool.scratch)
        call, sequences = on.dense, plan.dense
        _refill(call.queries, sequences.queries, 0)
        _refill(call.cu_seq_q, sequences.cu_seq_q, int(sequences.cu_seq_q[-1]))
        _refill(call.starts_k, sequences.starts_k, 0)
        _refill(call.seqused_k, sequences.seqused_k, 0)
        parts = _padded_parts(self._bucket)
        num_tokens, width = plan.parts.shape
        parts[:num_tokens, :width] = np.where(plan.parts == len(sequences.queries), self._bucket.queries, plan.parts)
        on.parts.copy_(torch.from_numpy(parts), non_blocking=True)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention) -> Tensor:
        """Raises ValueError for a sliding window: the plan is the same for all layers."""
        if how.window is not None:
            raise ValueError(f"a graph has one plan for all layers, and none for a window of {how.window} tokens")
        return attend(self._on, self._kernel, self._pool.tensors[layer], query, key, value, how)

    def finish(self) -> None:
        """All keys and values are where they stay."""


def _padding(bucket: DecodeBucket, scratch: int) -> CudaPlan:
    """A plan of padding alone."""
    borders_q, borders_k = np.zeros((2, bucket.sequences + 1), dtype=np.int32)
    lengths, queries = np.zeros(bucket.sequences, dtype=np.int32), np.zeros(bucket.queries, dtype=np.int64)
    return CudaPlan(
        slots=np.full(bucket.rows, scratch, dtype=np.int64),
        dense=Sequences(queries, borders_q, borders_k, lengths, QUERY_TILE, KEY_TILE),
        causal=Sequences.of(np.empty((0, 4), dtype=np.int64)),
        leaving=Sequences.of(np.empty((0, 4), dtype=np.int64)),
        parts=_padded_parts(bucket),
    )


def _padded_parts(bucket: DecodeBucket) -> np.ndarray:
    """Each row has part 0 and no other, so that there is something to merge."""
    parts = np.full((bucket.rows, bucket.parts), bucket.queries, dtype=np.int64)
    parts[:, 0] = 0
    return parts


def _refill(tensor: Tensor, values: np.ndarray, padding: int) -> None:
    padded = np.full(len(tensor), padding, dtype=values.dtype)
    padded[: len(values)] = values
    tensor.copy_(torch.from_numpy(padded), non_blocking=True)
