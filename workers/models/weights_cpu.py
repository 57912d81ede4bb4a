"""A decoder layer's products: by torch's linear layers, by oneDNN on packed weights, or by our tiles on their own.

The last two keep the weights a second time, in bf16, and apply what follows a product before its sums are rounded.

Shapes: `T` packed tokens, `E` hidden width, `H` query and `Hkv` key heads of width `D`, `F` width of the MLP.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segue.attention.cpu.kernels import PANEL_OUTPUTS, After, Kernels, PackedWeights

GATED = PANEL_OUTPUTS // 2  # outputs of the gate, followed by as many outputs of up, which they are multiplied with


class LayerWeights(Protocol):
    """The products of a layer, over packed tokens."""

    def qkv(self, hidden: Tensor, /) -> Tensor:
        """`[T, E]` -> `[T, (H + 2 Hkv) D]`"""
        ...

    def output(self, attended: Tensor, residual: Tensor) -> Tensor:
        """`[T, H D]`, `[T, E]` -> `[T, E]`"""
        ...

    def mlp(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """`[T, E]` twice -> `[T, E]`"""
        ...


class PlainWeights:
    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._qkv = _fused([attention.q_proj, attention.k_proj, attention.v_proj])
        self._output = attention.o_proj
        self._gate_up = _fused([mlp.gate_proj, mlp.up_proj])
        self._down = mlp.down_proj

    def qkv(self, hidden: Tensor) -> Tensor:
        return self._qkv(hidden)

    def output(self, attended: Tensor, residual: Tensor) -> Tensor:
        return residual + self._output(attended)

    def mlp(self, hidden: Tensor, residual: Tensor) -> Tensor:
        gate, up = self._gate_up(hidden).chunk(2, dim=-1)
        return residual + self._down(F.silu(gate).mul_(up))


class OneDnnWeights:
    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._qkv = OneDnnProduct([attention.q_proj, attention.k_proj, attention.v_proj])
        self._output = OneDnnProduct([attention.o_proj])
        self._gate, self._up, self._down = (
            OneDnnProduct([part]) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )

    def qkv(self, hidden: Tensor) -> Tensor:
        return self._qkv(hidden)

    def output(self, attended: Tensor, residual: Tensor) -> Tensor:
        return self._output.then("add", attended, residual)

    def mlp(self, hidden: Tensor, residual: Tensor) -> Tensor:
        gated = self._up.then("mul", hidden, self._gate(hidden, "swish"))
        return self._down.then("add", gated, residual)


class OneDnnProduct:
    """Layers with the same input as one product, by the operations that torch's own compiler calls."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weight, bias = _joined(layers)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = bias

    def __call__(self, inputs: Tensor, activation: str = "none") -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, activation, [], "")

    def then(self, operation: str, inputs: Tensor, other: Tensor) -> Tensor:
        """The product, and `add` or `mul` of another tensor of its shape."""
        return torch.ops.mkldnn._linear_pointwise.binary(inputs, other, self._weight, self._bias, operation)


class TiledWeights:
    def __init__(self, layer: Any, kernels: Kernels) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._kernels = kernels
        self._qkv = kernels.pack(*_joined([attention.q_proj, attention.k_proj, attention.v_proj]))
        self._output = kernels.pack(*_joined([attention.o_proj]))
        weight, bias = _joined([mlp.gate_proj, mlp.up_proj])
        self._gate_up = kernels.pack(_alternated(weight), None if bias is None else _alternated(bias))
        self._down = kernels.pack(*_joined([mlp.down_proj]))

    def qkv(self, hidden: Tensor) -> Tensor:
        return self._kernels.product(hidden, self._qkv)

    def output(self, attended: Tensor, residual: Tensor) -> Tensor:
        return self._kernels.product(attended, self._output, After.ADD, residual)

    def mlp(self, hidden: Tensor, residual: Tensor) -> Tensor:
        gated = self._kernels.product(hidden, self._gate_up, After.GATE)
        return self._kernels.product(gated, self._down, After.ADD, residual)

    @property
    def parts(self) -> tuple[PackedWeights, PackedWeights, PackedWeights, PackedWeights]:
        """Of queries, keys and values; of the attention's output; of gate and up; of down."""
        return self._qkv, self._output, self._gate_up, self._down

    @staticmethod
    def fit(layer: Any, kernels: Kernels) -> bool:
        """Whether tiles multiply weights of these shapes."""
        attention, mlp = layer.self_attn, layer.mlp
        inputs = (attention.q_proj.in_features, attention.o_proj.in_features, mlp.down_proj.in_features)
        return all(map(kernels.multiplies, inputs)) and mlp.gate_proj.out_features % GATED == 0


def tiled_product(layer: nn.Linear, kernels: Kernels) -> Callable[[Tensor], Tensor]:
    """`[..., K]` -> `[..., N]`"""
    weights = kernels.pack(*_joined([layer]))
    return lambda inputs: kernels.product(inputs.flatten(0, -2), weights).unflatten(0, inputs.shape[:-1])


def _joined(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights and bias of one layer for several with the same input."""
    weight = torch.cat([layer.weight for layer in layers]).detach()
    return weight, torch.cat([layer.bias for layer in layers]).detach() if layers[0].bias is not None else None


def _alternated(gate_up: Tensor) -> Tensor:
    """Two halves `[2 F, ...]`, GATED outputs of one after GATED of the other."""
    return gate_up.unflatten(0, (2, -1, GATED)).transpose(0, 1).flatten(0, 2)


def _fused(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer for several with the same input, which from now on are views of it."""
    widths = [layer.out_features for layer in layers]
    fused = nn.Linear(layers[0].in_features, sum(widths), bias=layers[0].bias is not None, device="meta")
    fused.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    for layer, part in zip(layers, fused.weight.split(widths), strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
    if layers[0].bias is not None:
        fused.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return fused
