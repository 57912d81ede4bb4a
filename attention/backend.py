"""One forward pass, as the attention layers see it: the blocks of a step, and the backend that computes them.

A model's attention layer calls `StepRun.attend` with its packed queries, keys and values. All keys of the layer are
written before any attention runs, so that a step can hold whole chains of segments.

Shapes: `T` packed tokens, `H` query heads, `Hkv` key heads, `D` head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from segue.attention.memory.budget import KVMemory, KVShape, Tail
from segue.attention.tree.blocks import StepBlocks


@dataclass(frozen=True, slots=True, eq=False)
class LayerAttention:
    """How a layer attends."""

    scale: float  # of scores
    window: int | None = None  # sliding window: see `attention/visibility.py`
    softcap: float | None = None  # a scaled score `s` becomes `softcap * tanh(s / softcap)`
    sinks: Tensor | None = None  # [H] fp32: a score of each query head that takes weight and has no value

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window has at least one token, got {self.window}")


def check_step(shape: KVShape, num_tokens: int, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises ValueError unless a layer's tensors are those of a step of `num_tokens` over memory of this shape.

    What else they were would be written behind the memory of a node.
    """
    wanted = (shape.num_kv_heads, num_tokens, shape.head_dim)
    is_query = query.dim() == 3 and query.shape[1:] == wanted[1:] and query.shape[0] % max(1, wanted[0]) == 0
    if not (is_query and query.shape[0] and key.shape == value.shape == wanted and 0 <= layer < shape.num_layers):
        raise ValueError(
            f"wanted keys and values {wanted}, queries of a multiple of {wanted[0]} heads and a layer below "
            f"{shape.num_layers}, got {tuple(key.shape)}, {tuple(value.shape)}, {tuple(query.shape)} and layer {layer}"
        )


class StepRun(Protocol):
    """A backend in the middle of a step."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention) -> Tensor:
        """query `[H, T, D]`, key and value `[Hkv, T, D]` of this step's tokens -> `[T, H, D]`.

        Writes the keys and values of the step's nodes and tails to their memory. Raises ValueError for what this
        backend cannot compute.
        """
        ...

    def finish(self) -> None:
        """To be called after the last layer: the keys and values of new nodes are complete then."""
        ...


class Backend(Protocol):
    """Computes the blocks of steps, in memory of the kind that it needs."""

    def new_memory(self, shape: KVShape, budget_bytes: int) -> KVMemory:
        """The memory in which all nodes and tails of its steps are allocated."""
        ...

    def begin(self, blocks: StepBlocks, tails: Sequence[Tail], memory: KVMemory) -> StepRun:
        """What all layers of a step share; made once, before the first layer.

        `tails[i]` is the tail of the query at `blocks.decode_index[i]`.
        """
        ...
