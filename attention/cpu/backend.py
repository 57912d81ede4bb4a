"""The default backend without a GPU: one call of a compiled kernel for each layer, or one for a whole decoder.

The kernel is given a step as *runs* with *spans* of keys (`attention/cpu/layer_tables.py`), and *parts*, the results of
large blocks. They are merged by log-sum-exp. Where tiles multiply, the kernel computes the parts. Elsewhere torch's
flash attention does, and their addresses are new in each layer; everything else in the tables is the same for all
layers of a kind.

Shapes: `T` packed tokens, `G` query heads a key head, `H = Hkv * G`, `n` queries of a block, `D` head width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from segue.attention.backend import LayerAttention, check_step
from segue.attention.cpu.flash import attend_all, attend_self
from segue.attention.cpu.kernels import Kernels, Tables
from segue.attention.cpu.layer_tables import Block, LayerTables, layer_tables
from segue.attention.cpu.node_pieces import piece_of, pieces_of
from segue.attention.memory.budget import KVMemory, KVShape, Tail
from segue.attention.memory.pieces import KVPieces, Piece
from segue.attention.tree.blocks import SelfBlock, StepBlocks
from segue.attention.tree.node import Node

FEW_PAIRS = 8192  # pairs of a query and a key that it sees: up to here a block is cheaper in the kernel than as a call
ONLY_KERNEL = 1 << 62  # pairs: more than any block has


class KernelBackend:
    """Computes a step's blocks on the CPU. `few_pairs`: blocks up to this size are left to the kernel."""

    def __init__(self, kernels: Kernels, few_pairs: int = FEW_PAIRS) -> None:
        self._kernels = kernels
        self._few_pairs = few_pairs

    def new_memory(self, shape: KVShape, budget_bytes: int) -> KVPieces:
        return KVPieces(shape, budget_bytes)

    def begin(self, blocks: StepBlocks, tails: Sequence[Tail], memory: KVMemory) -> "KernelStep":
        tails_of = dict(zip(blocks.decode_index, pieces_of(tails, memory), strict=True))
        shape = memory.shape
        has_tiles = shape.dtype == torch.bfloat16 and self._kernels.multiplies(shape.head_dim)
        return KernelStep(self._kernels, shape, blocks, tails_of, has_tiles=has_tiles, few_pairs=self._few_pairs)


class KernelStep:
    """What all layers of a step share: the blocks, and of each kind of layer the kernel's tables.

    `tails`: by the packed index of a decode query, the pieces with its new token and how much of each is used.
    """

    def __init__(
        self,
        kernels: Kernels,
        shape: KVShape,
        blocks: StepBlocks,
        tails: Mapping[int, Sequence[tuple[Piece, int]]],
        *,
        has_tiles: bool,
        few_pairs: int,
    ) -> None:
        self._kernels = kernels
        self._shape = shape
        self._blocks = blocks
        self._tails = tails
        self._has_tiles = has_tiles
        self._few_pairs = few_pairs
        self._own = {block.node: slice(block.start, block.stop) for block in blocks.self_blocks}
        self._longest = max(blocks.position_ids, default=-1) + 1
        self._of_kind: dict[tuple[int | None, bool], LayerTables] = {}

    def whole_tables(self, how: LayerAttention, counts: tuple[int, int, int]) -> Tables | None:
        """The tables if they are all that a layer needs, and the same for each layer of this kind.

        Else None: torch computes some of its blocks, or its scores are no plain products. Raises ValueError unless
        `counts`, the decoder's layers, key heads and numbers of a head, are those of the memory.
        """
        wanted = (self._shape.num_layers, self._shape.num_kv_heads, self._shape.head_dim)
        if counts != wanted:
            raise ValueError(f"wanted layers, key heads and numbers of a head {wanted}, got {counts}")
        if how.softcap is not None or how.sinks is not None:
            return None
        of_layer = self._tables_of(how)
        return None if of_layer.flash_blocks else of_layer.tables

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention) -> Tensor:
        """query `[H, T, D]`, key and value `[Hkv, T, D]` -> `[T, H, D]`."""
        check_step(self._shape, self._blocks.num_tokens, layer, query, key, value)
        of_layer = self._tables_of(how)
        results = []
        if of_layer.flash_blocks:
            del of_layer.tables.parts[:]
            packed = query.unflatten(0, (len(key), -1)).transpose(1, 2).contiguous()  # [Hkv, T, G, D]
            for block in of_layer.flash_blocks:
                out, lse = self._flash(block, layer, query, packed, key, value, how.scale)
                results.append((out, lse))  # keeps the memory whose addresses the kernel is told
                where = (block.start, out.data_ptr(), lse.data_ptr())
                of_layer.tables.parts.extend((*where, *out.stride()[:3], *lse.stride()))
        return self._kernels.attend(layer, query, key, value, how, of_layer.tables)

    def finish(self) -> None:
        """All keys and values are where they stay."""

    def _tables_of(self, how: LayerAttention) -> LayerTables:
        """A window that is longer than every row hides nothing."""
        window = how.window if how.window is not None and how.window < self._longest else None
        kind = window, how.softcap is not None
        if kind not in self._of_kind:
            by_tiles = self._has_tiles and kind == (None, False)
            few_pairs = ONLY_KERNEL if how.softcap is not None else self._few_pairs
            self._of_kind[kind] = layer_tables(
                self._blocks, self._tails, window, by_tiles=by_tiles, few_pairs=few_pairs
            )
        return self._of_kind[kind]

    def _flash(
        self, block: Block, layer: int, query: Tensor, packed: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """-> (`[Hkv, n, G, D]`, LSE `[Hkv, n, G]`)"""
        if isinstance(block, SelfBlock):
            return attend_self(block, query, packed, key, value, scale)
        return attend_all(packed[:, block.start : block.stop], *self._read(block.node, layer, key, value), scale)

    def _read(self, node: Node, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a node, `[Hkv, n, D]` each: the step's own are not in their memory yet."""
        own = self._own.get(node)
        return piece_of(node).read(layer) if own is None else (key[:, own], value[:, own])
