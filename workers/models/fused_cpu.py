"""Llama-like decoders on CPUs in fewer and larger calls: in small models a call costs as much as what it computes.

Queries, keys and values are one product, gate and up another; norms and rotary positions take as few passes over their
numbers as possible. The weights are those of the transformers model, whose own code stays the oracle. In bf16 they are
kept a second time, in the layout in which they are multiplied: to make it in each call is a third of the time of a
product of few tokens. Residuals and gates are applied to sums before these are rounded. On processors with AMX our
kernels multiply, and all layers are one call; elsewhere oneDNN multiplies.

Shapes: `T` packed tokens, `E` hidden width, `H` query and `Hkv` key heads of width `D`, `F` width of the MLP.
"""

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from segue.attention.backend import LayerAttention, StepRun
from segue.attention.cpu.backend import KernelStep
from segue.attention.cpu.kernels import DTYPES, Kernels, Tables
from segue.workers.devices.devices import cpu_kernels, cpu_multiplies_bf16
from segue.workers.models.support import layer_windows
from segue.workers.models.weights_cpu import (
    LayerWeights,
    OneDnnProduct,
    OneDnnWeights,
    PlainWeights,
    TiledWeights,
    tiled_product,
)

KINDS = frozenset({"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"})
MAX_BYTES = 4 << 30  # of weights: in a larger model the number of calls does not matter, and fusing takes a copy
MAX_PACKED_BYTES = 1 << 30  # of a model whose weights are kept twice, as they are and packed


class FusedDecoder:
    """From token ids to final hidden states, as a transformers decoder of one of KINDS does it."""

    def __init__(self, model: Any, *, packs: bool, kernels: Kernels | None) -> None:
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        self._embedding = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        small = _Small(kernels) if kernels is not None else _PlainSmall()
        self._norm = small.norm(decoder.norm)
        self._whole: _WholeDecoder | None = None
        self.head: Callable[[Tensor], Tensor] = head  # hidden `[..., E]` -> `[..., V]`
        weights: Sequence[LayerWeights]
        if packs and kernels is not None and TiledWeights.fit(decoder.layers[0], kernels):
            weights = tiled = [TiledWeights(layer, kernels) for layer in decoder.layers]
            self._whole = _WholeDecoder(decoder, tiled, kernels)
            self.head = tiled_product(head, kernels)
        elif packs and cpu_multiplies_bf16():
            weights = [OneDnnWeights(layer) for layer in decoder.layers]
            self.head = OneDnnProduct([head])
        else:
            weights = [PlainWeights(layer) for layer in decoder.layers]
        hows = _layer_attentions(decoder)
        self._hows = {how.window: how for how in hows}.values()  # of each kind of layer one
        layers = zip(decoder.layers, weights, hows, strict=True)
        self._layers = [_FusedLayer(layer, of_layer, small, how) for layer, of_layer, how in layers]

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """None for a decoder of another kind, a large or quantised one, and one that is not wholly on one CPU."""
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
        packs = num_bytes <= MAX_PACKED_BYTES and model.dtype == torch.bfloat16
        is_one_type = {parameter.dtype for parameter in parameters} <= {model.dtype} and model.dtype in DTYPES
        return cls(model, packs=packs, kernels=cpu_kernels() if is_one_type else None)

    def __call__(self, ids: Tensor, positions: Tensor, run: StepRun) -> Tensor:
        """ids and positions `[1, T]` -> `[T, E]`, with `run` as the attention of every layer."""
        hidden = self._embedding(ids)[0]
        cos, sin = self._rotary(hidden[None], positions)
        tables = self._whole_tables(run)
        if self._whole is not None and tables is not None:
            return self._norm(self._whole(hidden, cos[0], sin[0], tables))
        for number, layer in enumerate(self._layers):
            hidden = layer(number, hidden, cos[0], sin[0], run)
        return self._norm(hidden)

    def _whole_tables(self, run: StepRun) -> Tables | None:
        """The tables of a step if they are all that it needs, and the same for all layers."""
        if self._whole is None or not isinstance(run, KernelStep):
            return None
        first, *others = [run.whole_tables(how, self._whole.counts) for how in self._hows]
        return first if all(tables is first for tables in others) else None


def _layer_attentions(decoder: Any) -> list[LayerAttention]:
    windows = layer_windows(decoder.config)
    scales = [float(layer.self_attn.scaling) for layer in decoder.layers]
    return [LayerAttention(scale, window) for scale, window in zip(scales, windows, strict=True)]


class _FusedLayer:
    def __init__(self, layer: Any, weights: LayerWeights, small: "_PlainSmall | _Small", how: LayerAttention) -> None:
        attention = layer.self_attn
        self._weights = weights
        self._small = small
        self._head_dim = int(attention.head_dim)
        self._how = how
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
        return run.attend(number, query, key, value, self._how)


class _WholeDecoder:
    """All layers as one call."""

    def __init__(self, decoder: Any, weights: Sequence[TiledWeights], kernels: Kernels) -> None:
        attention, norm = decoder.layers[0].self_attn, decoder.norm
        num_keys = attention.k_proj.out_features // attention.head_dim
        num_groups = attention.q_proj.out_features // attention.k_proj.out_features
        width, mlp_width = norm.weight.shape[0], decoder.layers[0].mlp.down_proj.in_features
        self._kernels = kernels
        self._kept = weights, [list(layer.parameters()) for layer in decoder.layers]  # whose addresses are told
        self.counts = len(weights), num_keys, int(attention.head_dim)  # layers, key heads, numbers of a head
        self._decoder = array("q", (len(weights), width, mlp_width, num_keys, num_groups, attention.head_dim))
        self._layers = array("q")
        for layer, (qkv, output, gate_up, down) in zip(decoder.layers, (each.parts for each in weights), strict=True):
            names = ("q_norm", "k_norm") if hasattr(layer.self_attn, "q_norm") else ()
            head_norms = [getattr(layer.self_attn, name).weight.data_ptr() for name in names] or (0, 0)
            self._layers.extend((layer.input_layernorm.weight.data_ptr(), *head_norms))
            self._layers.extend((*qkv.pointers(), *output.pointers(), layer.post_attention_layernorm.weight.data_ptr()))
            self._layers.extend((*gate_up.pointers(), *down.pointers()))
        self._numbers = {"scale": float(attention.scaling), "epsilon": float(norm.variance_epsilon)}

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, tables: Tables) -> Tensor:
        """hidden `[T, E]`, which is lost, cos and sin `[T, D]` -> `[T, E]`"""
        self._kernels.decode_(self._decoder, self._layers, hidden, cos, sin, tables, **self._numbers)
        return hidden


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
