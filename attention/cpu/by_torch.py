"""The backend for CPUs without a C++ compiler: torch's operations, some calls for each block, merged by log-sum-exp.

Works on the same memory as the kernels and gives the same answers, more slowly: in a small model a call costs more than
what it computes, and a layer has a call for each block and for each piece of a tail.

Shapes: `T` packed tokens, `G` query heads a key head, `H = Hkv * G`, `n` queries of a block, `D` head width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from segue.attention.backend import LayerAttention, check_step
from segue.attention.cpu.flash import attend_all, attend_self
from segue.attention.cpu.masked import attend_masked
from segue.attention.cpu.node_pieces import piece_of, pieces_of
from segue.attention.memory.budget import KVMemory, KVShape, Tail
from segue.attention.memory.pieces import KVPieces, Piece
from segue.attention.tree.blocks import SelfBlock, StepBlocks
from segue.attention.visibility import is_in_window

Part = tuple[slice, Tensor, Tensor]  # queries, out [Hkv, n, G, D], LSE [Hkv, n, G]


class TorchBackend:
    """Executes a step's blocks one by one."""

    def new_memory(self, shape: KVShape, budget_bytes: int) -> KVPieces:
        return KVPieces(shape, budget_bytes)

    def begin(self, blocks: StepBlocks, tails: Sequence[Tail], memory: KVMemory) -> "TorchStep":
        return TorchStep(memory.shape, blocks, pieces_of(tails, memory))


class TorchStep:
    """`tails`: of each decode query, the pieces with its new token and how much of each is used."""

    def __init__(self, shape: KVShape, blocks: StepBlocks, tails: Sequence[Sequence[tuple[Piece, int]]]) -> None:
        self._shape = shape
        self._blocks = blocks
        self._positions = torch.tensor(blocks.position_ids)
        self._tails = list(zip(blocks.decode_index, tails, strict=True))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention) -> Tensor:
        """query `[H, T, D]`, key and value `[Hkv, T, D]` -> `[T, H, D]`."""
        check_step(self._shape, self._blocks.num_tokens, layer, query, key, value)
        self._keep(layer, key, value)
        packed = query.unflatten(0, (len(key), -1)).transpose(1, 2).contiguous()  # [Hkv, T, G, D]
        out = torch.zeros(packed.shape, dtype=torch.float32)
        lse = torch.full(packed.shape[:-1], -torch.inf)
        for rows, part, part_lse in self._parts(layer, query, packed, key, value, how):
            merge_part_(out[:, rows], lse[:, rows], part, part_lse)
        if how.sinks is not None:
            out *= torch.sigmoid(lse - how.sinks.view(len(key), 1, -1))[..., None]
        return out.transpose(0, 1).flatten(1, 2).to(query.dtype)

    def finish(self) -> None:
        """All keys and values are where they stay."""

    def _keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        for block in self._blocks.self_blocks:
            piece_of(block.node).write(layer, key[:, block.start : block.stop], value[:, block.start : block.stop])
        for index, pieces in self._tails:
            last, used = pieces[-1]
            last.write(layer, key[:, index : index + 1], value[:, index : index + 1], used - 1)

    def _parts(
        self, layer: int, query: Tensor, packed: Tensor, key: Tensor, value: Tensor, how: LayerAttention
    ) -> Iterator[Part]:
        for block in self._blocks.self_blocks:
            rows = slice(block.start, block.stop)
            if how.softcap is None and not self._clips_itself(block, how):
                yield rows, *attend_self(block, query, packed, key, value, how.scale)
            else:
                seen = self._seen_of_itself(block, how)
                yield rows, *attend_masked(packed[:, rows], key[:, rows], value[:, rows], how, seen)
        for block in self._blocks.cross_blocks:
            rows = slice(block.start, block.stop)
            yield from self._part(rows, block.node.start, packed, *piece_of(block.node).read(layer), how)
        for index, pieces in self._tails:
            first = int(self._positions[index]) + 1 - sum(used for _, used in pieces)
            for piece, used in pieces:
                yield from self._part(slice(index, index + 1), first, packed, *piece.read(layer, used), how)
                first += used

    def _part(
        self, rows: slice, first: int, packed: Tensor, key: Tensor, value: Tensor, how: LayerAttention
    ) -> Iterator[Part]:
        """Queries over earlier keys, which begin at position `first`. None if the window hides all of them."""
        seen = None
        if how.window is not None:
            keys = torch.arange(first, first + key.shape[1])
            seen = is_in_window(self._positions[rows], keys, how.window)
            if not seen.any():
                return
            seen = None if seen.all() else seen
        if seen is None and how.softcap is None:
            yield rows, *attend_all(packed[:, rows], key, value, how.scale)
        else:
            yield rows, *attend_masked(packed[:, rows], key, value, how, seen)

    @staticmethod
    def _clips_itself(block: SelfBlock, how: LayerAttention) -> bool:
        return how.window is not None and block.is_causal and len(block.node) > how.window

    def _seen_of_itself(self, block: SelfBlock, how: LayerAttention) -> Tensor | None:
        """bool `[n, n]`; None for a bidirectional segment, whose tokens all see each other."""
        if not block.is_causal:
            return None
        places = torch.arange(len(block.node))
        seen = places[:, None] >= places
        return seen if how.window is None else seen & is_in_window(places, places, how.window)


def merge_part_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Add attention over further keys to what `out` and `lse` already cover, in place.

    out `[..., D]` and lse `[...]` (natural log) are fp32; where they cover no keys, out is 0 and lse is -inf, and so it
    is with a part. The idea is that of FlashAttention's split keys and of Hydragen's shared prefixes (arXiv
    2402.05099).
    """
    part_share = torch.sigmoid(part_lse - lse)  # exp(part) / (exp(lse) + exp(part))
    part_share.masked_fill_(part_lse == -torch.inf, 0.0)  # of nothing, also where there was nothing before
    out.lerp_(part_out.to(out.dtype), part_share.unsqueeze(-1))
    torch.logaddexp(lse, part_lse, out=lse)
