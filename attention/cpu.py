"""The default backend without a GPU: torch's flash attention for CPU, block by block, merged by log-sum-exp.

`aten::_scaled_dot_product_flash_attention_for_cpu` is used because it returns the log-sum-exp. Four traps of it are
guarded here (torch 2.13): empty keys kill the process; fully masked rows give LSE 0.0 instead of -inf; `is_causal` is
aligned top-left, so it is right for squares only; boolean masks are rejected.

Shapes: `T` packed tokens, `G` query heads a key head, `H = Hkv * G`, `D` head width. Accumulators are laid out
`[Hkv, T, G, D]`: a slice of queries is then a plain view `[Hkv, n * G, D]` that reads each key once for its group.
"""

import torch
from torch import Tensor

from attention.blocks import CrossBlock, SelfBlock
from attention.merge import merge_part_
from attention.step import TailBatch, TreeStep, kv_of
from attention.tree import Node


def flash(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, is_causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """query `[B, H, Q, D]`, key, value `[B, Hkv, K, D]` -> out `[B, H, Q, D]`, LSE `[B, H, Q]` (natural log, fp32)."""
    if key.shape[-2] == 0:
        raise ValueError("attention over no keys: torch's CPU kernel would end the process")
    if is_causal and query.shape[-2] != key.shape[-2]:
        raise ValueError(f"causal attention must be square, got {query.shape[-2]} queries over {key.shape[-2]} keys")
    if bias is not None and bias.dtype == torch.bool:
        raise ValueError("a boolean mask is rejected by torch's CPU kernel; pass an additive one")
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale
    )


class CpuBackend:
    """Executes a step's blocks on the CPU."""

    def attend(self, step: TreeStep, layer: int, query: Tensor, scale: float) -> Tensor:
        """query `[H, T, D]` -> `[T, H, D]`."""
        num_heads, num_tokens, head_dim = query.shape
        packed = query.view(step.num_kv_heads, -1, num_tokens, head_dim).transpose(1, 2).contiguous()  # [Hkv, T, G, D]
        out = torch.empty(packed.shape, dtype=torch.float32)
        lse = torch.empty(packed.shape[:-1], dtype=torch.float32)
        for block in step.blocks.self_blocks:
            self._self_block(block, layer, query, packed, scale, out, lse)
        for batch in step.tails:
            self._tail_batch(batch, layer, packed, scale, out, lse)
        self._cross_blocks(step.blocks.cross_blocks, layer, packed, scale, out, lse)
        return out.permute(1, 0, 2, 3).reshape(num_tokens, num_heads, head_dim).to(query.dtype)

    def _self_block(
        self, block: SelfBlock, layer: int, query: Tensor, packed: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        rows = slice(block.start, block.stop)
        if not block.is_causal:
            out[:, rows], lse[:, rows] = _dense(block.node, layer, packed[:, rows], scale)
            return
        kv = kv_of(block.node)
        part, part_lse = flash(
            query[None, :, rows], kv.keys(layer)[None], kv.values(layer)[None], scale=scale, is_causal=True
        )
        groups = packed.shape[2]
        out[:, rows] = part[0].unflatten(0, (-1, groups)).transpose(1, 2)
        lse[:, rows] = part_lse[0].unflatten(0, (-1, groups)).transpose(1, 2)

    def _tail_batch(self, batch: TailBatch, layer: int, packed: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
        query = packed[:, batch.query_index].transpose(0, 1)  # [B, Hkv, G, D]
        bias = _padding_bias(batch, packed.dtype) if batch.is_ragged else None
        part, part_lse = flash(query, batch.keys(layer), batch.values(layer), scale=scale, bias=bias)
        out[:, batch.query_index] = part.transpose(0, 1).float()
        lse[:, batch.query_index] = part_lse.transpose(0, 1)

    def _cross_blocks(
        self, blocks: tuple[CrossBlock, ...], layer: int, packed: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        """Level by level: the queries of one level's blocks are disjoint, so one merge serves them all."""
        for level in _levels(blocks):
            rows = slice(level[0].start, level[-1].stop)
            part_out = torch.zeros_like(out[:, rows])
            part_lse = torch.full_like(lse[:, rows], -torch.inf)
            for block in level:
                inside = slice(block.start - rows.start, block.stop - rows.start)
                part = _dense(block.node, layer, packed[:, block.start : block.stop], scale)
                part_out[:, inside], part_lse[:, inside] = part
            merge_part_(out[:, rows], lse[:, rows], part_out, part_lse)


def _dense(node: Node, layer: int, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """All of `queries` `[Hkv, n, G, D]` over all keys of a node -> (`[Hkv, n, G, D]`, LSE `[Hkv, n, G]`)."""
    kv = kv_of(node)
    part, part_lse = flash(queries.flatten(1, 2)[None], kv.keys(layer)[None], kv.values(layer)[None], scale=scale)
    return part[0].view(queries.shape), part_lse[0].view(queries.shape[:-1])


def _levels(blocks: tuple[CrossBlock, ...]) -> list[list[CrossBlock]]:
    levels: dict[int, list[CrossBlock]] = {}
    for block in blocks:
        levels.setdefault(block.level, []).append(block)
    return [sorted(level, key=lambda block: block.start) for level in levels.values()]


def _padding_bias(batch: TailBatch, dtype: torch.dtype) -> Tensor:
    """`[B, 1, 1, K]`: -inf past the end of each tail. Every tail has at least one token, so no row is empty."""
    is_padding = torch.arange(batch.max_length) >= batch.lengths[:, None]
    bias = torch.zeros(is_padding.shape, dtype=dtype).masked_fill_(is_padding, -torch.inf)
    return bias[:, None, None, :]
