"""torch's flash attention for CPUs, one call for each block.

`aten::_scaled_dot_product_flash_attention_for_cpu` is used because it returns the log-sum-exp. It has four traps (torch
2.13): empty keys end the process; fully masked rows give LSE 0.0 instead of -inf; `is_causal` is aligned top-left, so
that it is right for squares only; boolean masks are rejected. `flash` refuses what would run into them.

Shapes: `n` queries, `K` keys, `G` query heads a key head, `H = Hkv * G`, `D` head width.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from segue.attention.tree.blocks import SelfBlock

KEY_TILE = 32  # torch's kernel takes up to four times as long if the number of keys is not a multiple of this
FEW_KEYS = 128  # below so many keys, or queries, padding the keys to a multiple does not pay


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


def attend_self(
    block: SelfBlock, query: Tensor, packed: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """A node over its own keys -> (`[Hkv, n, G, D]`, LSE `[Hkv, n, G]`)"""
    rows, num_tokens = slice(block.start, block.stop), block.stop - block.start
    if not block.is_causal:
        return attend_all(packed[:, rows], key[:, rows], value[:, rows], scale)
    parts = query[:, rows], key[:, rows], value[:, rows]
    if num_tokens >= FEW_KEYS:  # the padding comes after every query, and causal queries do not see it
        parts = tuple(_padded(part) for part in parts)
    part, part_lse = flash(*(part[None] for part in parts), scale=scale, is_causal=True)  # type: ignore[misc]
    heads = (-1, packed.shape[2])  # [Hkv, G]
    part, part_lse = part[0, :, :num_tokens], part_lse[0, :, :num_tokens]
    return part.unflatten(0, heads).transpose(1, 2), part_lse.unflatten(0, heads).transpose(1, 2)


def attend_all(queries: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`[Hkv, n, G, D]` over all of `[Hkv, K, D]` -> (`[Hkv, n, G, D]`, LSE `[Hkv, n, G]`)."""
    query, num_keys, bias = queries.flatten(1, 2), key.shape[1], None
    if num_keys % KEY_TILE and num_keys >= FEW_KEYS and query.shape[1] >= FEW_KEYS:
        key, value = _padded(key), _padded(value)
        bias = _end_bias(num_keys, key.dtype).expand(1, 1, query.shape[1], -1)
    part, part_lse = flash(query[None], key[None], value[None], scale=scale, bias=bias)
    return part[0].view(queries.shape), part_lse[0].view(queries.shape[:-1])


def _padded(tokens: Tensor) -> Tensor:
    """`[B, n, D]` -> `[B, n up to a whole KEY_TILE, D]`"""
    return functional.pad(tokens, (0, 0, 0, -tokens.shape[1] % KEY_TILE))


@lru_cache(maxsize=64)
def _end_bias(num_keys: int, dtype: torch.dtype) -> Tensor:
    """`[1, 1, 1, num_keys up to a whole KEY_TILE]`: -inf past the keys."""
    return functional.pad(torch.zeros(1, 1, 1, num_keys, dtype=dtype), (0, -num_keys % KEY_TILE), value=-torch.inf)
