"""One forward pass, as the attention layers see it: blocks, and a backend at work on them.

A model's attention layer calls `StepRun.attend` with its packed queries, keys and values. All keys of the layer are
written before any attention runs, so a step may hold whole chains of segments.

Shapes: `T` packed tokens, `H` query heads, `Hkv` key heads, `D` head width.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from segue.attention.memory.budget import KVMemory, KVShape, Tail
from segue.attention.tree.blocks import StepBlocks


class StepRun(Protocol):
    """A backend in the middle of a step."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query `[H, T, D]`, key and value `[Hkv, T, D]` of this step's tokens -> `[T, H, D]`.

        Keeps the keys and values of the step's nodes and of its rows' tails.
        """
        ...

    def finish(self) -> None:
        """Every layer has attended: the new nodes' keys and values are complete."""
        ...


class Backend(Protocol):
    """Executes the blocks of steps, in memory of the kind it needs."""

    def new_memory(self, shape: KVShape, budget_bytes: int) -> KVMemory:
        """What all nodes and tails of its steps are allocated in."""
        ...

    def begin(self, blocks: StepBlocks, tails: Sequence[Tail], memory: KVMemory) -> StepRun:
        """What all layers of a step share; made once, before the first.

        `tails[i]` is that of the query at `blocks.decode_index[i]`; all tails of the memory are given.
        """
        ...


class TreeStep:
    """A step in the making. Call `run.finish` after the last layer."""

    def __init__(self, blocks: StepBlocks, tails: Sequence[Tail], memory: KVMemory, backend: Backend) -> None:
        self.blocks = blocks
        self.run = backend.begin(blocks, tails, memory)
