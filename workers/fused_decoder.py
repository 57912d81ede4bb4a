"""Llama-like decoders on CPUs in fewer and larger calls: in small models a call costs as much as what it computes.

Queries, keys and values are one product, gate and up another; norms and rotary positions take the fewest passes over
their numbers. The weights are those of the transformers model, whose own code stays the oracle. In bf16 they are kept
once more in the layout of oneDNN's kernels, which otherwise is made in each call and is a third of what a product of
few tokens takes; these kernels also add and gate what they have computed before they round it.

Shapes: `T` packed tokens, `E` hidden width, `H` query and `Hkv` key heads of width `D`, `F` width of the MLP.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention.kernels import DTYPES, Kernels
from attention.step import StepRun
from workers.devices import cpu_kernels

KINDS = frozenset({"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"})
MAX_BYTES = 4 << 30  # of weights: in a larger model calls are not what counts, and fusing takes a copy
MAX_PACKED_BYTES = 1 << 30  # of a model whose weights are kept twice, as they are and packed


class FusedDecoder:
    """From token ids to final hidden states, as a transformers decoder of one of KINDS does it."""

    def __init__(self, model: Any, *, packs: bool, kernels: Kernels | None) -> None:
        decoder = model.get_decoder()
        self._embedding = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        weights = _PackedWeights if packs else _PlainWeights
        small = _Small(kernels) if kernels is not None else _PlainSmall()
        self._layers = [_FusedLayer(layer, weights(layer), small) for layer in decoder.layers]
        self._norm = small.norm(decoder.norm)
        head = model.get_output_embeddings()
        self.head: Callable[[Tensor], Tensor] = _Packed([head]) if packs else head  # hidden `[..., E]` -> `[..., V]`

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """None for a decoder of another kind, a large, a quantised one, or one that is not on one CPU as a whole."""
        decoder = model.get_decoder()
        if type(decoder).__name__ not in KINDS:
            return None
        parameters = list(model.parameters())
        num_bytes = sum(parameter.nbytes for parameter in parameters)
        is_small = num_bytes <= MAX_BYTES
        is_here = all(parameter.device.type == "cpu" for parameter in parameters)
        is_plain = getattr(decoder.config, "quantization_config", None) is None
        is_split = any(hasattr(module, "_hf_hook") for module in decoder.modules())  # by accelerate
        is_whole = is_here and not is_split
        if not (is_small and is_plain and is_whole and decoder.config.hidden_act == "silu"):
            return None
        packs = num_bytes <= MAX_PACKED_BYTES and model.dtype == torch.bfloat16 and _has_packed_products()
        is_one_type = {parameter.dtype for parameter in parameters} <= {model.dtype} and model.dtype in DTYPES
        return cls(model, packs=packs, kernels=cpu_kernels() if is_one_type else None)

    def __call__(self, ids: Tensor, positions: Tensor, run: StepRun) -> Tensor:
        """ids and positions `[1, T]` -> `[T, E]`, with `run` as the attention of every layer."""
        hidden = self._embedding(ids)[0]
        cos, sin = self._rotary(hidden[None], positions)
        for number, layer in enumerate(self._layers):
            hidden = layer(number, hidden, cos[0], sin[0], run)
        return self._norm(hidden)


class _FusedLayer:
    def __init__(self, layer: Any, weights: "_PlainWeights | _PackedWeights", small: "_PlainSmall | _Small") -> None:
        attention = layer.self_attn
        self._weights = weights
        self._small = small
        self._head_dim = int(attention.head_dim)
        self._scale = float(attention.scaling)
        self._num_queries = attention.q_proj.out_features // self._head_dim
        self._num_keys = attention.k_proj.out_features // self._head_dim
        has_head_norms = hasattr(attention, "q_norm")
        self._head_norms = [small.norm(attention.q_norm), small.norm(attention.k_norm)] if has_head_norms else []
        self._norms = small.norm(layer.input_layernorm), small.norm(layer.post_attention_layernorm)

    def __call__(self, number: int, hidden: Tensor, cos: Tensor, sin: Tensor, run: StepRun) -> Tensor:
        """hidden `[T, E]`, cos and sin `[T, D]` -> `[T, E]`"""
        attended = self._attended(number, self._norms[0](hidden), cos, sin, run).flatten(1)
        hidden = self._weights.output(attended, hidden)
        return self._weights.mlp(self._norms[1](hidden), hidden)

    def _attended(self, number: int, hidden: Tensor, cos: Tensor, sin: Tensor, run: StepRun) -> Tensor:
        """-> `[T, H, D]`"""
        heads = self._weights.qkv(hidden).unflatten(-1, (-1, self._head_dim))  # [T, H + 2 Hkv, D]
        counts = (self._num_queries, self._num_keys, self._num_keys)
        if self._head_norms:
            parts = heads.split(counts, dim=1)
            norms = zip(self._head_norms, parts, strict=False)
            heads = torch.cat([*(norm(part) for norm, part in norms), parts[2]], dim=1)
        self._small.rotate_(heads[:, : -self._num_keys], cos, sin)
        query, key, value = heads.transpose(0, 1).split(counts)
        return run.attend(number, query, key, value, self._scale)


class _PlainWeights:
    """A layer's products by torch's own linear layers."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _fused([attention.q_proj, attention.k_proj, attention.v_proj])  # `[T, E]` -> `[T, (H + 2 Hkv) D]`
        self._output = attention.o_proj
        self._gate_up = _fused([mlp.gate_proj, mlp.up_proj])
        self._down = mlp.down_proj

    def output(self, attended: Tensor, residual: Tensor) -> Tensor:
        """`[T, H D]`, `[T, E]` -> `[T, E]`"""
        return residual + self._output(attended)

    def mlp(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """`[T, E]` twice -> `[T, E]`"""
        gate, up = self._gate_up(hidden).chunk(2, dim=-1)
        return residual + self._down(F.silu(gate).mul_(up))


class _PackedWeights:
    """The same by oneDNN's, with what follows a product done in it."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _Packed([attention.q_proj, attention.k_proj, attention.v_proj])
        self._output = _Packed([attention.o_proj])
        self._gate, self._up, self._down = (_Packed([part]) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def output(self, attended: Tensor, residual: Tensor) -> Tensor:
        return self._output.then("add", attended, residual)

    def mlp(self, hidden: Tensor, residual: Tensor) -> Tensor:
        gated = self._up.then("mul", hidden, self._gate(hidden, "swish"))
        return self._down.then("add", gated, residual)


class _Packed:
    """Layers with the same input as one product, their weights in the layout of oneDNN's kernels."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weight = torch.cat([layer.weight for layer in layers]).detach()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = torch.cat([layer.bias for layer in layers]).detach() if layers[0].bias is not None else None

    def __call__(self, inputs: Tensor, activation: str = "none") -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, activation, [], "")

    def then(self, operation: str, inputs: Tensor, other: Tensor) -> Tensor:
        """The product, and `add` or `mul` of another tensor of its shape."""
        return torch.ops.mkldnn._linear_pointwise.binary(inputs, other, self._weight, self._bias, operation)


def _has_packed_products() -> bool:
    """Whether oneDNN computes in bf16 here. torch's own compiler calls the same operations."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _PlainSmall:
    """Norms and rotary positions by torch's operations."""

    def norm(self, norm: Any) -> Callable[[Tensor], Tensor]:
        weight, epsilon = norm.weight, float(norm.variance_epsilon)
        return lambda hidden: F.rms_norm(hidden, weight.shape, weight, epsilon)

    def rotate_(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Heads `[T, N, D]`, in place: each half is turned by the other. cos and sin `[T, D]`"""
        low, high = (part.clone() for part in heads.chunk(2, dim=-1))
        middle = low.shape[-1]
        heads.mul_(cos[:, None])
        heads[..., :middle].addcmul_(high, sin[:, None, :middle], value=-1)
        heads[..., middle:].addcmul_(low, sin[:, None, middle:])


class _Small:
    """The same by compiled kernels, each in one pass."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.rotate_ = kernels.rotate_

    def norm(self, norm: Any) -> Callable[[Tensor], Tensor]:
        return partial(self._kernels.rms_norm, weight=norm.weight, epsilon=float(norm.variance_epsilon))


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
