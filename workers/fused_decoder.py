"""Llama-like decoders on CPUs in fewer and larger calls: in small models a call costs as much as what it computes.

Queries, keys and values are one product, gate and up another; norms and rotary positions take the fewest passes over
their numbers. The weights are those of the transformers model, whose own code stays the oracle.

Shapes: `T` packed tokens, `E` hidden width, `H` query and `Hkv` key heads of width `D`, `F` width of the MLP.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention.step import StepRun

KINDS = frozenset({"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"})
MAX_BYTES = 4 << 30  # of weights: in a larger model calls are not what counts, and fusing takes a copy


class FusedDecoder:
    """From token ids to final hidden states, as a transformers decoder of one of KINDS does it."""

    def __init__(self, decoder: Any) -> None:
        self._embedding = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._layers = [_FusedLayer(layer) for layer in decoder.layers]
        self._norm = _Norm(decoder.norm)

    @classmethod
    def of(cls, decoder: Any) -> Self | None:
        """None for a decoder of another kind, a large, a quantised one, or one that is not on one CPU as a whole."""
        if type(decoder).__name__ not in KINDS:
            return None
        parameters = list(decoder.parameters())
        is_small = sum(parameter.nbytes for parameter in parameters) <= MAX_BYTES
        is_here = all(parameter.device.type == "cpu" for parameter in parameters)
        is_plain = getattr(decoder.config, "quantization_config", None) is None
        is_split = any(hasattr(module, "_hf_hook") for module in decoder.modules())  # by accelerate
        is_whole = is_here and not is_split
        return cls(decoder) if is_small and is_plain and is_whole and decoder.config.hidden_act == "silu" else None

    def __call__(self, ids: Tensor, positions: Tensor, run: StepRun) -> Tensor:
        """ids and positions `[1, T]` -> `[T, E]`, with `run` as the attention of every layer."""
        hidden = self._embedding(ids)[0]
        cos, sin = self._rotary(hidden[None], positions)
        cos, sin = cos[0, :, None], sin[0, :, None]  # [T, 1, D]
        for number, layer in enumerate(self._layers):
            hidden = layer(number, hidden, cos, sin, run)
        return self._norm(hidden)


class _FusedLayer:
    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._head_dim = int(attention.head_dim)
        self._scale = float(attention.scaling)
        self._num_queries = attention.q_proj.out_features // self._head_dim
        self._num_keys = attention.k_proj.out_features // self._head_dim
        self._qkv = _fused([attention.q_proj, attention.k_proj, attention.v_proj])
        self._head_norms = [_Norm(attention.q_norm), _Norm(attention.k_norm)] if hasattr(attention, "q_norm") else []
        self._output = attention.o_proj
        self._gate_up = _fused([mlp.gate_proj, mlp.up_proj])
        self._down = mlp.down_proj
        self._norms = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)

    def __call__(self, number: int, hidden: Tensor, cos: Tensor, sin: Tensor, run: StepRun) -> Tensor:
        """hidden `[T, E]`, cos and sin `[T, 1, D]` -> `[T, E]`"""
        hidden = hidden + self._output(self._attended(number, self._norms[0](hidden), cos, sin, run).flatten(1))
        gate, up = self._gate_up(self._norms[1](hidden)).chunk(2, dim=-1)
        return hidden + self._down(F.silu(gate).mul_(up))

    def _attended(self, number: int, hidden: Tensor, cos: Tensor, sin: Tensor, run: StepRun) -> Tensor:
        """-> `[T, H, D]`"""
        heads = self._qkv(hidden).unflatten(-1, (-1, self._head_dim))  # [T, H + 2 Hkv, D]
        counts = (self._num_queries, self._num_keys, self._num_keys)
        if self._head_norms:
            parts = heads.split(counts, dim=1)
            norms = zip(self._head_norms, parts, strict=False)
            heads = torch.cat([*(norm(part) for norm, part in norms), parts[2]], dim=1)
        turned = _turned(heads[:, : -self._num_keys], cos, sin)
        query, key = turned.split(counts[:2], dim=1)
        value = heads[:, -self._num_keys :]
        return run.attend(number, query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), self._scale)


class _Norm:
    """A root-mean-square norm."""

    def __init__(self, norm: Any) -> None:
        self._weight, self._epsilon = norm.weight, float(norm.variance_epsilon)

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self._weight.shape, self._weight, self._epsilon)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: heads `[T, N, D]`, each half of a head turned by the other."""
    middle = heads.shape[-1] // 2
    turned = heads * cos
    turned[..., :middle].addcmul_(heads[..., middle:], sin[..., :middle], value=-1)
    turned[..., middle:].addcmul_(heads[..., :middle], sin[..., middle:])
    return turned


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
