"""The backend for GPUs: every block of a step is one sequence of a variable-length attention call, and a token's parts
are merged by log-sum-exp.

`torch.nn.attention.varlen.varlen_attn` takes sequences of queries that lie one after the other, and for each where its
keys begin (`cu_seq_k`) and how many there are (`seqused_k`). Keys lie in a pool (`attention/kv_pool.py`), so a block
needs no copy of them and no table: (slice of queries, node) is (queries, first key, number of keys). A step makes two
calls a layer, however many rows it has: one for what is not causal, in which the query heads of a key head are further
queries of it, and one for causal squares.

Work is cut so that a kernel is busy whatever the shape: at most QUERY_TILE tokens of queries a sequence (the grid is as
high as the longest one), and at most KEY_TILE keys (a long shared node is read by many processors at once). Cuts depend
on a node and its place alone, never on the batch.

Traps (torch 2.13): the log-sum-exp is natural and `[H, T]`, whatever the docstring says; over no keys it is +inf, so no
sequence is empty here; causal squares are aligned at the bottom right; fp16 and bf16 only.

Shapes: `T` packed tokens, `H = Hkv * G` query heads, `D` head width, `N` sequences, `Q` their queries (a token occurs
once for each block that it is in), `M` most parts of a token.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention.blocks import StepBlocks
from attention.kv_memory import KVMemory, KVShape, Tail
from attention.kv_pool import Extent, KVPool, ranges
from attention.tree import Node

QUERY_TILE = 128  # tokens; a kernel's block has as many queries
KEY_TILE = 2048
FLASH_DTYPES = (torch.float16, torch.bfloat16)

Kernel = Callable[..., tuple[Tensor, Tensor]]


@cache
def cuda_kernel() -> Kernel:
    """torch's own; the log-sum-exp beside the output.

    One split: the order of a sum must not depend on the batch, and other kernels are not chosen behind our back.
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
    enable_gqa: bool = False,  # it finds out
) -> tuple[Tensor, Tensor]:
    """What torch 2.13's varlen_attn calls, for images with torch 2.11 or 2.12, which have the kernel, and no public
    name for keys that begin anywhere."""
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


class VarlenBackend:
    """Executes a step's blocks with two calls a layer. `kernel`: for tests, which have no GPU."""

    def __init__(self, kernel: Kernel | None = None, layer_devices: Sequence[torch.device] | None = None) -> None:
        self._kernel = kernel
        self._layer_devices = layer_devices

    def new_memory(self, shape: KVShape, budget_bytes: int) -> KVPool:
        """Raises ValueError for what the kernel does not compute."""
        if self._kernel is None and (shape.device.type != "cuda" or shape.dtype not in FLASH_DTYPES):
            raise ValueError(
                f"backend varlen wants a CUDA device and float16 or bfloat16, got {shape.device.type} and {shape.dtype}"
            )
        return KVPool(shape, budget_bytes, self._layer_devices)

    def begin(self, blocks: StepBlocks, tails: Sequence[Tail], memory: KVMemory) -> "_VarlenStep":
        if not isinstance(memory, KVPool):
            raise TypeError(f"wanted a pool, got {type(memory).__name__}")
        return _VarlenStep(VarlenPlan(blocks, tails), memory, self.kernel)

    @property
    def kernel(self) -> Kernel:
        return self._kernel or cuda_kernel()


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences of one call, on the host. int32 as kernels want them, but for what indexes tensors."""

    queries: np.ndarray  # [Q] int64: packed positions
    cu_seq_q: np.ndarray  # [N + 1]
    starts_k: np.ndarray  # [N + 1]: places in the pool; the last says nothing
    seqused_k: np.ndarray  # [N]
    max_q: int
    max_k: int

    @classmethod
    def of(cls, blocks: np.ndarray) -> "Sequences":
        """blocks `[N, 4]`: first query, number of queries, first key, number of keys."""
        first_q, num_q, first_k, num_k = blocks.T
        cu_seq_q = np.zeros(len(blocks) + 1, dtype=np.int32)
        np.cumsum(num_q, out=cu_seq_q[1:])
        starts = np.append(first_k, first_k[-1:] + num_k[-1:]).astype(np.int32)
        longest = (int(num_q.max(initial=0)), int(num_k.max(initial=0)))
        return cls(ranges(first_q, num_q), cu_seq_q, starts, num_k.astype(np.int32), *longest)


class VarlenPlan:
    """Where a step's tokens are kept, the sequences of its two calls, and which parts of them each token has."""

    def __init__(self, blocks: StepBlocks, tails: Sequence[Tail]) -> None:
        self.num_tokens = blocks.num_tokens
        own = [(block, _extent(block.node)) for block in blocks.self_blocks]
        self.slots = _slots(blocks, [(block.start, extent) for block, extent in own], tails)  # [T] int64
        causal = [(block.start, len(block.node), extent.start) for block, extent in own if block.is_causal]
        dense = [(b.start, len(b.node), extent.start, len(b.node)) for b, extent in own if not b.is_causal]
        for block in blocks.cross_blocks:
            extent = _extent(block.node)
            dense.append((block.start, block.stop - block.start, extent.start, extent.length))
        for index, tail in zip(blocks.decode_index, tails, strict=True):
            dense.append((index, 1, tail.place, tail.length + 1))
        self.dense = Sequences.of(_tiled(_array(dense, 4)))
        self.causal = Sequences.of(_tiled_causal(_array(causal, 3)))
        # Parts are numbered as they come out: first the dense call's, then the causal one's, then one of no weight.
        self.parts = _parts_of(np.concatenate([self.dense.queries, self.causal.queries]), self.num_tokens)  # [T, M]


class _VarlenStep:
    """A plan on the devices of its layers."""

    def __init__(self, plan: VarlenPlan, pool: KVPool, kernel: Kernel) -> None:
        self._plan = plan
        self._pool = pool
        self._kernel = kernel
        self._on: dict[torch.device, _OnDevice] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query `[H, T, D]`, key and value `[Hkv, T, D]` -> `[T, H, D]`."""
        on = self._on.get(query.device) or self._on.setdefault(query.device, _OnDevice(self._plan, query.device))
        return _attend(on, self._kernel, self._pool.tensors[layer], query, key, value, scale)

    def finish(self) -> None:
        """All is where it belongs already."""


class PaddedDecode:
    """A step of decoding rows in tensors of rounded sizes, which other steps of about that size fill again: a CUDA
    graph replays the same calls on the same addresses.

    What pads has no queries, or goes to the pool's scratch place; the hidden states of padding rows are of no use.
    """

    def __init__(self, bucket: "DecodeBucket", pool: KVPool, kernel: Kernel) -> None:
        self._pool = pool
        self._kernel = kernel
        self._bucket = bucket
        self._on = _OnDevice(_padding(bucket, pool.scratch), pool.tensors[0].device)

    def load(self, plan: VarlenPlan) -> None:
        """The next step's numbers. Raises ValueError for one of another bucket."""
        if DecodeBucket.of(plan) != self._bucket:
            raise ValueError(f"a step of {DecodeBucket.of(plan)} does not fit {self._bucket}")
        on, pool = self._on, self._pool
        _refill(on.slots, plan.slots, pool.scratch)
        call, sequences = on.dense, plan.dense
        _refill(call.queries, sequences.queries, 0)
        _refill(call.cu_seq_q, sequences.cu_seq_q, int(sequences.cu_seq_q[-1]))
        _refill(call.starts_k, sequences.starts_k, 0)
        _refill(call.seqused_k, sequences.seqused_k, 0)
        parts = np.full((self._bucket.rows, self._bucket.parts), self._bucket.queries, dtype=np.int64)
        parts[:, 0] = 0
        num_tokens, width = plan.parts.shape
        parts[:num_tokens, :width] = np.where(plan.parts == len(sequences.queries), self._bucket.queries, plan.parts)
        on.parts.copy_(torch.from_numpy(parts), non_blocking=True)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return _attend(self._on, self._kernel, self._pool.tensors[layer], query, key, value, scale)

    def finish(self) -> None:
        """All is where it belongs already."""


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """The rounded sizes of a step of decoding rows."""

    rows: int
    sequences: int
    queries: int
    parts: int

    @classmethod
    def of(cls, plan: VarlenPlan) -> "DecodeBucket":
        """Raises ValueError for a step that computes nodes."""
        if len(plan.causal.queries):
            raise ValueError("a step with nodes to compute is none of decoding rows alone")
        rows, sequences, queries = plan.num_tokens, len(plan.dense.seqused_k), len(plan.dense.queries)
        parts = plan.parts.shape[1] + plan.parts.shape[1] % 2
        return cls(_rounded(rows), _rounded(sequences), _rounded(queries), parts)


def _rounded(number: int) -> int:
    """Up to a power of two, or one and a half times one."""
    power = 1 << max(0, number - 1).bit_length()
    return power * 3 // 4 if power >= 4 and number <= power * 3 // 4 else power


def _padding(bucket: DecodeBucket, scratch: int) -> Any:
    """A plan in which nothing is asked."""
    dense = Sequences(
        np.zeros(bucket.queries, dtype=np.int64),
        np.zeros(bucket.sequences + 1, dtype=np.int32),
        np.zeros(bucket.sequences + 1, dtype=np.int32),
        np.zeros(bucket.sequences, dtype=np.int32),
        QUERY_TILE,
        KEY_TILE,
    )
    nothing = Sequences.of(_array([], 4))
    plan = VarlenPlan.__new__(VarlenPlan)
    plan.num_tokens = bucket.rows
    plan.slots = np.full(bucket.rows, scratch, dtype=np.int64)
    plan.dense, plan.causal = dense, nothing
    plan.parts = np.full((bucket.rows, bucket.parts), bucket.queries, dtype=np.int64)
    plan.parts[:, 0] = 0
    return plan


def _refill(tensor: Tensor, values: np.ndarray, padding: int) -> None:
    padded = np.full(len(tensor), padding, dtype=values.dtype)
    padded[: len(values)] = values
    tensor.copy_(torch.from_numpy(padded), non_blocking=True)


def _attend(
    on: "_OnDevice", kernel: Kernel, pool: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """pool `[2, P, Hkv, D]`, query `[H, T, D]`, key and value `[Hkv, T, D]` -> `[T, H, D]`."""
    keys, values = pool
    keys.index_copy_(0, on.slots, key.transpose(0, 1))
    values.index_copy_(0, on.slots, value.transpose(0, 1))
    num_heads, num_tokens, head_dim = query.shape
    num_kv_heads = key.shape[0]
    tokens = query.transpose(0, 1)  # [T, H, D]
    grouped = tokens.unflatten(1, (num_kv_heads, -1)).transpose(1, 2)  # [T, G, Hkv, D]
    out, lse = _dense(kernel, on.dense, grouped, keys, values, scale)
    if on.causal.num_queries:
        more, more_lse = _causal(kernel, on.causal, tokens, keys, values, scale)
        out = torch.cat([out, more.unflatten(1, (num_kv_heads, -1)).transpose(1, 2)])
        lse = torch.cat([lse, more_lse.unflatten(1, (num_kv_heads, -1)).transpose(1, 2)])
    merged = _merged(on.parts, out, lse)  # [T, G, Hkv, D]
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


def _causal(
    kernel: Kernel, call: "_Call", tokens: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """-> (`[Q, H, D]`, LSE `[Q, H]`)"""
    out, lse = kernel(
        tokens.index_select(0, call.queries),
        keys,
        values,
        call.cu_seq_q,
        call.starts_k,
        call.max_q,
        call.max_k,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=call.seqused_k,
    )
    return out, lse.transpose(0, 1)


class _OnDevice:
    """A plan's tensors."""

    def __init__(self, plan: VarlenPlan, device: torch.device) -> None:
        self.slots = _sent(plan.slots, device)
        self.dense = _Call(plan.dense, device)
        self.causal = _Call(plan.causal, device)
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


def _merged(parts: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """parts `[T, M]`, out `[Q, G, Hkv, D]`, lse `[Q, G, Hkv]` -> `[T, G, Hkv, D]` fp32.

    A part numbered `Q` is none: it has no weight.
    """
    if parts.shape[1] == 1:
        return out.index_select(0, parts[:, 0]).float()
    none = lse.new_full((1, *lse.shape[1:]), -torch.inf)
    weights = torch.cat([lse, none])[parts].softmax(dim=1)  # [T, M, G, Hkv]
    rows = parts.remainder(len(out))  # none is the first, which is a number: no weight times garbage may be garbage
    merged = out[rows[:, 0]].float().mul_(weights[:, 0, ..., None])
    for part in range(1, parts.shape[1]):
        merged.addcmul_(out[rows[:, part]], weights[:, part, ..., None])
    return merged


def _slots(blocks: StepBlocks, own: Sequence[tuple[int, Extent]], tails: Sequence[Tail]) -> np.ndarray:
    """`[T]`: where each token's key and value go."""
    slots = np.empty(blocks.num_tokens, dtype=np.int64)
    for start, extent in own:
        slots[start : start + extent.length] = np.arange(extent.start, extent.start + extent.length)
    slots[list(blocks.decode_index)] = [tail.place + tail.length for tail in tails]
    return slots


def _tiled(blocks: np.ndarray) -> np.ndarray:
    """`[N, 4]`, cut to at most QUERY_TILE queries and KEY_TILE keys each, query tiles in order."""
    return _cut(_cut(blocks, 0, QUERY_TILE), 2, KEY_TILE)


def _cut(blocks: np.ndarray, column: int, size: int) -> np.ndarray:
    """Each block as pieces of at most `size` in (first, number) at `column`."""
    counts = -(-blocks[:, column + 1] // size)
    pieces = np.repeat(blocks, counts, axis=0)
    offsets = ranges(np.zeros(len(blocks), dtype=np.int64), counts) * size
    pieces[:, column] += offsets
    pieces[:, column + 1] = np.minimum(pieces[:, column + 1] - offsets, size)
    return pieces


def _tiled_causal(squares: np.ndarray) -> np.ndarray:
    """squares `[N, 3]`: first query, number, first key -> `[N, 4]`: queries in tiles, each over all keys up to its end.

    A kernel aligns them at the bottom right: the last query sees all of these keys.
    """
    first_q, number, first_k = squares.T
    tiles = _cut(np.stack([first_q, number], axis=1), 0, QUERY_TILE)
    counts = -(-number // QUERY_TILE)
    ends = tiles[:, 0] + tiles[:, 1] - np.repeat(first_q, counts)
    return np.column_stack([tiles, np.repeat(first_k, counts), ends])


def _parts_of(queries: np.ndarray, num_tokens: int) -> np.ndarray:
    """`[T, M]`: for each token the places where it is among `queries`, filled up with `len(queries)`."""
    order = np.argsort(queries, kind="stable")
    tokens = queries[order]
    first = np.searchsorted(tokens, np.arange(num_tokens))
    rank = np.arange(len(tokens)) - first[tokens]
    parts = np.full((num_tokens, int(rank.max(initial=0)) + 1), len(queries), dtype=np.int64)
    parts[tokens, rank] = order
    return parts


def _array(rows: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, width)


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _extent(node: Node) -> Extent:
    if not isinstance(node.kv, Extent):
        raise ValueError(f"a node of {len(node)} tokens at position {node.start} has no KV memory")
    return node.kv
