"""The default backend without a GPU: one call of a compiled kernel a layer, or one of all layers for a whole decoder.

A step is told to the kernel as *runs*, queries with the same keys: a node's own tokens, or a generating row's one. A
run has *spans*, keys it still has to see, and *parts*, what has been made of its large blocks, merged by log-sum-exp.
Where tiles multiply, the kernel makes them; elsewhere torch's flash attention does, and of a layer their addresses are
new. All else is the same for all layers of a step.

Shapes: `T` packed tokens, `G` query heads a key head, `H = Hkv * G`, `n` queries of a block, `D` head width.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from segue.attention.cpu.flash import attend_all, attend_self
from segue.attention.cpu.kernels import SPAN_FIELDS, Kernels, Tables
from segue.attention.cpu.node_pieces import piece_of, pieces_of
from segue.attention.memory.budget import KVMemory, KVShape, Tail
from segue.attention.memory.pieces import KVPieces, Piece
from segue.attention.tree.blocks import CrossBlock, SelfBlock, StepBlocks

FEW_PAIRS = 8192  # of a query and a key it sees: up to here a block is cheaper in the kernel than in a call of its own

SHORT_RUN = 32  # queries

Block = SelfBlock | CrossBlock


class NativeBackend:
    """Executes a step's blocks on the CPU. `few_pairs`: blocks up to this size are left to the kernel."""

    def __init__(self, kernels: Kernels, few_pairs: int = FEW_PAIRS) -> None:
        self._kernels = kernels
        self._few_pairs = few_pairs

    def new_memory(self, shape: KVShape, budget_bytes: int) -> KVPieces:
        return KVPieces(shape, budget_bytes)

    def begin(self, blocks: StepBlocks, tails: Sequence[Tail], memory: KVMemory) -> "NativeStep":
        tails_of = dict(zip(blocks.decode_index, pieces_of(tails, memory), strict=True))
        shape = memory.shape
        by_tiles = shape.dtype == torch.bfloat16 and self._kernels.multiplies(shape.head_dim)
        candidates = _of_short_runs(blocks) if by_tiles else (*blocks.self_blocks, *blocks.cross_blocks)
        large = [block for block in candidates if _num_pairs(block) > self._few_pairs]
        return NativeStep(self._kernels, blocks, large, tails_of, by_tiles=by_tiles)


class NativeStep:
    """What all layers of a step share: the kernel's tables, and the blocks that are flash attention's.

    `tails`: of generating rows by packed index, the pieces with their new token and how much of each is used.
    """

    def __init__(
        self,
        kernels: Kernels,
        blocks: StepBlocks,
        large: Sequence[Block],
        tails: Mapping[int, Sequence[tuple[Piece, int]]],
        *,
        by_tiles: bool,
    ) -> None:
        self._kernels = kernels
        self._own = {block.node: slice(block.start, block.stop) for block in blocks.self_blocks}
        self.tables = tables = Tables(by_tiles=by_tiles)
        for own in blocks.self_blocks:
            tables.kept.extend((*piece_of(own.node).place(), own.start, own.stop))
        for index, pieces in tails.items():
            last, used = pieces[-1]
            tables.kept.extend((*last.place(used - 1), index, index + 1))
        number_of = {id(block): number for number, block in enumerate(large)}
        for start, stop, seen in _runs(blocks):
            first = len(tables.spans) // SPAN_FIELDS, len(tables.indices)
            for block in seen:
                if id(block) in number_of:
                    tables.indices.append(number_of[id(block)])
                else:
                    tables.spans.extend(self._span(block))
            for piece, used in tails.get(start, ()):
                tables.spans.extend((*piece.place(), 0, used, False))
            end = len(tables.spans) // SPAN_FIELDS, len(tables.indices)
            tables.runs.extend((start, stop, first[0], end[0], first[1], end[1]))
        self._flash_blocks = () if by_tiles else large
        for block in large if by_tiles else ():
            tables.blocks.extend((block.start, block.stop, *self._span(block)))

    @property
    def is_whole(self) -> bool:
        """Whether the tables tell everything, and so are the same for every layer."""
        return not self._flash_blocks

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query `[H, T, D]`, key and value `[Hkv, T, D]` -> `[T, H, D]`."""
        results = []
        if self._flash_blocks:
            del self.tables.parts[:]
            packed = query.unflatten(0, (len(key), -1)).transpose(1, 2).contiguous()  # [Hkv, T, G, D]
            for block in self._flash_blocks:
                out, lse = self._flash(block, layer, query, packed, key, value, scale)
                results.append((out, lse))  # which keeps their memory
                where = (block.start, out.data_ptr(), lse.data_ptr())
                self.tables.parts.extend((*where, *out.stride()[:3], *lse.stride()))
        return self._kernels.attend(layer, query, key, value, scale, self.tables)

    def finish(self) -> None:
        """Everything is where it stays."""

    def _flash(
        self, block: Block, layer: int, query: Tensor, packed: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """-> (`[Hkv, n, G, D]`, LSE `[Hkv, n, G]`)"""
        if isinstance(block, SelfBlock):
            return attend_self(block, query, packed, key, value, scale)
        if block.node in self._own:
            place = self._own[block.node]
            keys, values = key[:, place], value[:, place]
        else:
            keys, values = piece_of(block.node).read(layer)
        return attend_all(packed[:, block.start : block.stop], keys, values, scale)

    def _span(self, block: Block) -> tuple[int, ...]:
        if block.node not in self._own:
            return (*piece_of(block.node).place(), 0, len(block.node), False)
        is_causal = isinstance(block, SelfBlock) and block.is_causal
        return (0, 0, 0, 0, 0, self._own[block.node].start, len(block.node), is_causal)


def _of_short_runs(blocks: StepBlocks) -> Iterator[CrossBlock]:
    """Those that many runs see, of too few queries each to fill the rows that tiles multiply at once."""
    starts = sorted([*(block.start for block in blocks.self_blocks), *blocks.decode_index])
    for block in blocks.cross_blocks:
        num_runs = bisect_left(starts, block.stop) - bisect_left(starts, block.start)
        if num_runs > 1 and block.stop - block.start < SHORT_RUN * num_runs:
            yield block


def _num_pairs(block: Block) -> int:
    """Queries and keys that they see."""
    pairs = (block.stop - block.start) * len(block.node)
    return pairs // 2 if isinstance(block, SelfBlock) and block.is_causal else pairs


def _runs(blocks: StepBlocks) -> Iterator[tuple[int, int, list[Block]]]:
    """Queries `[start, stop)` with the same keys, in order, and their blocks, save for tails."""
    below = sorted(blocks.cross_blocks, key=lambda block: (block.start, block.level))
    own: list[tuple[int, int, list[Block]]] = [(block.start, block.stop, [block]) for block in blocks.self_blocks]
    own += [(index, index + 1, []) for index in blocks.decode_index]
    above: list[Block] = []
    num_begun = 0
    for start, stop, self_blocks in sorted(own, key=lambda run: run[0]):
        while above and above[-1].stop <= start:
            above.pop()
        while num_begun < len(below) and below[num_begun].start <= start:
            above.append(below[num_begun])
            num_begun += 1
        yield start, stop, [*above, *self_blocks]
