"""On CPUs without a C++ compiler: torch's flash attention, block by block, small blocks batched, merged by log-sum-exp.

Shapes: `T` packed tokens, `G` query heads a key head, `H = Hkv * G`, `D` head width. Accumulators are laid out
`[Hkv, T, G, D]`: a slice of queries is then a plain view `[Hkv, n * G, D]` that reads each key once for its group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from segue.attention.cpu.flash import attend_all, attend_self, flash
from segue.attention.cpu.kv_cache import KVCache
from segue.attention.cpu.merge import merge_part_
from segue.attention.cpu.small_blocks import SmallBatch, SmallBlocks, SmallGroup, small_blocks
from segue.attention.cpu.step_memory import StepMemory, TailBatch, kv_of
from segue.attention.memory.budget import KVMemory, KVShape, Tail
from segue.attention.tree.blocks import CrossBlock, StepBlocks
from segue.attention.tree.tree import Node

KeysValues = tuple[Tensor, Tensor]


class CpuBackend:
    """Executes a step's blocks on the CPU: small ones in batches, the others one by one."""

    def new_memory(self, shape: KVShape, budget_bytes: int) -> KVCache:
        return KVCache(shape, budget_bytes)

    def begin(self, blocks: StepBlocks, tails: Sequence[Tail], memory: KVMemory) -> "_CpuStep":
        return _CpuStep(small_blocks(blocks), StepMemory(blocks, tails, memory))


class _CpuStep:
    """What all layers of a step share: the batches of small blocks, and the biases that hide their padding."""

    def __init__(self, blocks: SmallBlocks, memory: StepMemory) -> None:
        self.blocks = blocks
        self.memory = memory
        self._levels = _levels(blocks.large_cross)
        self._tails = [(batch, _padding_bias(batch) if batch.is_ragged else None) for batch in memory.tails]
        prompts = (blocks.own.batches, blocks.large_self, blocks.above, self._levels, len(blocks.single))
        self._has_tails_alone = not any(prompts)
        self._biases: dict[int, Tensor] = {}  # by batch; made in the first layer, which knows the number of heads

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query `[H, T, D]`, key and value `[Hkv, T, D]` -> `[T, H, D]`."""
        self.memory.write(layer, key, value)
        num_heads, num_tokens, head_dim = query.shape
        if self._has_tails_alone:
            return self._tails_alone(layer, query, len(key), scale)
        packed = query.view(len(key), -1, num_tokens, head_dim).transpose(1, 2).contiguous()  # [Hkv, T, G, D]
        sums = _Sums(
            torch.empty(packed.shape, dtype=torch.float32), torch.empty(packed.shape[:-1], dtype=torch.float32)
        )
        blocks = self.blocks
        _single_tokens(blocks.single, packed, key, value, scale, sums)
        if blocks.own.batches:
            sums.set(blocks.own.index, *self._small(blocks.own, packed, key, value, scale))
        for block in blocks.large_self:
            sums.set(slice(block.start, block.stop), *attend_self(block, query, packed, key, value, scale))
        for batch, bias in self._tails:
            queries = packed[:, batch.rows].transpose(0, 1)  # [B, Hkv, G, D]
            part, part_lse = flash(queries, batch.keys(layer), batch.values(layer), scale=scale, bias=bias)
            sums.set(batch.rows, part.transpose(0, 1), part_lse.transpose(0, 1))
        for above in blocks.above:
            sums.merge(above.index, *self._small(above, packed, key, value, scale))
        for level in self._levels:
            _merge_level(level, partial(_keys_of, blocks.place, layer, key, value), packed, scale, sums)
        out = sums.out.transpose(0, 1)  # [T, Hkv, G, D]
        return torch.empty(out.shape, dtype=query.dtype).copy_(out).view(num_tokens, num_heads, head_dim)

    def _tails_alone(self, layer: int, query: Tensor, num_key_heads: int, scale: float) -> Tensor:
        """A step of generating rows whose prompts are in their tails: nothing to merge. -> `[T, H, D]`"""
        queries = query.transpose(0, 1).unflatten(1, (num_key_heads, -1))  # [T, Hkv, G, D]
        out = torch.empty(queries.shape, dtype=query.dtype)
        for batch, bias in self._tails:
            keys, values = batch.keys(layer), batch.values(layer)
            out[batch.rows] = flash(queries[batch.rows], keys, values, scale=scale, bias=bias)[0]
        return out.flatten(1, 2)

    def finish(self) -> None:
        self.memory.finish()

    def _small(self, group: SmallGroup, packed: Tensor, key: Tensor, value: Tensor, scale: float) -> KeysValues:
        """-> (`[Hkv, V, G, D]`, LSE `[Hkv, V, G]`)"""
        queries = packed.index_select(1, group.queries)
        keys, values = key.index_select(1, group.keys), value.index_select(1, group.keys)
        parts = [
            _small_batch(
                queries[:, batch.queries],
                keys[:, batch.keys],
                values[:, batch.keys],
                scale,
                num_blocks=batch.num_blocks,
                bias=self._bias(batch, len(key), packed.shape[2]),
            )
            for batch in group.batches
        ]
        part, part_lse = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
        return part.index_select(1, group.is_query), part_lse.index_select(1, group.is_query)

    def _bias(self, batch: SmallBatch, num_heads: int, groups: int) -> Tensor:
        if id(batch) not in self._biases:
            self._biases[id(batch)] = _bias(batch, num_heads, groups)
        return self._biases[id(batch)]


@dataclass(frozen=True, slots=True)
class _Sums:
    """What the keys seen so far amount to, in fp32: out `[Hkv, T, G, D]`, lse `[Hkv, T, G]`."""

    out: Tensor
    lse: Tensor

    def set(self, rows: slice | Tensor, part: Tensor, part_lse: Tensor) -> None:
        """The first keys of some queries."""
        self.out[:, rows] = part.to(self.out.dtype)
        self.lse[:, rows] = part_lse

    def merge(self, rows: slice | Tensor, part: Tensor, part_lse: Tensor) -> None:
        """Further keys; `rows` are distinct."""
        if isinstance(rows, slice):
            merge_part_(self.out[:, rows], self.lse[:, rows], part, part_lse)
            return
        out, lse = self.out[:, rows], self.lse[:, rows]
        merge_part_(out, lse, part, part_lse)
        self.out[:, rows], self.lse[:, rows] = out, lse


def _keys_of(place: dict[Node, slice], layer: int, key: Tensor, value: Tensor, node: Node) -> KeysValues:
    """`[Hkv, n, D]` each: from the step itself if the node is new, else from its memory."""
    if node in place:
        return key[:, place[node]], value[:, place[node]]
    kv = kv_of(node)
    return kv.keys(layer), kv.values(layer)


def _single_tokens(index: Tensor, packed: Tensor, key: Tensor, value: Tensor, scale: float, sums: _Sums) -> None:
    """Over one key the softmax is 1: the answer is the value, the log-sum-exp the score."""
    if not len(index):
        return
    queries, keys = packed[:, index].float(), key[:, index].float()
    sums.lse[:, index] = torch.einsum("htgd,htd->htg", queries, keys) * scale
    sums.out[:, index] = value[:, index].float()[:, :, None].expand(queries.shape)


def _small_batch(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, num_blocks: int, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """query `[Hkv, B * Q, G, D]`, key and value `[Hkv, B * K, D]` -> (`[Hkv, B * Q, G, D]`, LSE `[Hkv, B * Q, G]`)

    Plain products in fp32: at these sizes twice to six times as fast as a flash kernel, which has a call to make for
    every block and head. The log-sum-exp comes from the largest weight, which is exp(its score - LSE).
    """
    rows = (len(query) * num_blocks, -1, query.shape[-1])  # [Hkv * B, Q * G or K, D]
    q, k, v = (part.float().reshape(rows) for part in (query, key, value))
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)  # [Hkv * B, Q * G, K]
    weights = scores.softmax(dim=-1)
    lse = scores.amax(dim=-1).sub_(weights.amax(dim=-1).log_())
    return torch.bmm(weights, v).view(query.shape), lse.view(query.shape[:-1])


def _bias(batch: SmallBatch, num_heads: int, groups: int) -> Tensor:
    """What `[Hkv * B, Q * G, K]` takes: -inf for hidden keys."""
    if batch.is_hidden is None:
        return torch.zeros(1)
    bias = torch.zeros(batch.is_hidden.shape).masked_fill_(batch.is_hidden, -torch.inf)  # [B or 1, Q or 1, K]
    if bias.shape[1] > 1:
        bias = bias.repeat_interleave(groups, dim=1)
    return bias if len(bias) == 1 else bias.repeat(num_heads, 1, 1)


def _merge_level(
    level: Sequence[CrossBlock], keys_of: Callable[[Node], KeysValues], packed: Tensor, scale: float, sums: _Sums
) -> None:
    """The queries of one level's blocks are disjoint, so one merge serves them all."""
    if len(level) == 1:
        rows = slice(level[0].start, level[0].stop)
        sums.merge(rows, *attend_all(packed[:, rows], *keys_of(level[0].node), scale))
        return
    rows = slice(level[0].start, level[-1].stop)
    part_out = torch.zeros_like(sums.out[:, rows])
    part_lse = torch.full_like(sums.lse[:, rows], -torch.inf)
    for block in level:
        inside = slice(block.start - rows.start, block.stop - rows.start)
        part = attend_all(packed[:, block.start : block.stop], *keys_of(block.node), scale)
        part_out[:, inside], part_lse[:, inside] = part
    sums.merge(rows, part_out, part_lse)


def _levels(blocks: tuple[CrossBlock, ...]) -> list[list[CrossBlock]]:
    levels: dict[int, list[CrossBlock]] = {}
    for block in blocks:
        levels.setdefault(block.level, []).append(block)
    return [sorted(level, key=lambda block: block.start) for level in levels.values()]


def _padding_bias(batch: TailBatch) -> Tensor:
    """`[B, 1, 1, K]`: -inf past the end of each tail. Every tail has at least one token, so no row is empty."""
    is_padding = torch.arange(batch.max_length) >= batch.lengths[:, None]
    bias = torch.zeros(is_padding.shape, dtype=batch.arena.tensor.dtype).masked_fill_(is_padding, -torch.inf)
    return bias[:, None, None, :]
