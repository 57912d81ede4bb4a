"""A transformers model whose attention runs over the segment tree.

The model's own code does everything but attention: embeddings, projections, rotary positions, experts, norms. Attention
is registered as one more of transformers' implementations. It has no mask function, so no mask is ever built. Does not
know files or jobs.

Shapes: `T` packed tokens, `N` selected tokens, `V` vocabulary, `E` hidden width.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from segue.attention.backend import LayerAttention, StepRun
from segue.attention.memory.budget import KVShape
from segue.attention.segments import Segment, num_tokens
from segue.attention.tree.blocks import StepBlocks, blocks_of
from segue.attention.tree.cache import NodeCache
from segue.workers.devices.devices import make_backend
from segue.workers.errors import ModelRefused
from segue.workers.models import support
from segue.workers.models.fused_cpu import FusedDecoder
from segue.workers.models.long_rope import LongRope, is_long_token

ATTENTION_NAME = "segue_tree"
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}  # of the logits' norm
QUANTIZED_TOLERANCE = 5e-2


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segue_step: StepRun | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Has the signature of transformers' attention; query `[1, H, T, D]` -> `[1, T, H, D]`."""
    if segue_step is None:
        raise ModelRefused(f"{type(module).__name__} does not pass extra arguments to its attention")
    check_attention_call(module, attention_mask, kwargs)
    layer, sinks = int(module.layer_idx), kwargs.get("s_aux")  # type: ignore[arg-type]
    how = LayerAttention(
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=window_of(module, kwargs),
        softcap=kwargs.get("softcap"),
        sinks=None if sinks is None else sinks.float(),
    )
    out = segue_step.attend(layer, query[0], key[0], value[0], how)
    return out.unsqueeze(0), None


def window_of(module: nn.Module, kwargs: Mapping[str, Any]) -> int | None:
    """The sliding window of a layer's attention, from its configuration.

    Raises ModelRefused if the model tells its attention another one.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    window = support.layer_windows(module.config)[layer]
    if "sliding_window" in kwargs and (kwargs["sliding_window"] or None) != window:
        raise ModelRefused(
            f"{type(module).__name__}: layer {layer} has a sliding window of {kwargs['sliding_window']} tokens, its "
            f"configuration says {window}"
        )
    return window


def check_attention_call(module: nn.Module, attention_mask: Tensor | None, kwargs: Mapping[str, Any]) -> None:
    """Raises ModelRefused for arguments of a model's attention that ours, in serving or training, would ignore."""
    if attention_mask is not None:
        raise ModelRefused(f"{type(module).__name__} insists on a mask of its own")
    if kwargs.get("position_bias") is not None:
        raise ModelRefused(f"{type(module).__name__} adds a bias to scores (position_bias), which is not supported")


@dataclass(eq=False)
class TreeModel:
    """A loaded model, its tokenizer, and what the engine must know about it."""

    model: Any  # PreTrainedModel; its attention is the tree's
    tokenizer: Any  # PreTrainedTokenizerBase
    kv_shape: KVShape
    max_model_len: int
    eos_token_ids: frozenset[int]
    long_rope: LongRope | None = None  # for models whose rotary positions differ for long rows
    fused: FusedDecoder | None = None  # the same decoder in fewer calls, for kinds of models that have one

    @property
    def layer_devices(self) -> list[torch.device]:
        """The device of each layer's attention. All are one device, unless the model is larger than a device."""
        return [_device_of(layer) for layer in self.model.get_decoder().layers]

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @torch.inference_mode()
    def forward(self, blocks: StepBlocks, run: StepRun) -> Tensor:
        """The final hidden states of a step's tokens, `[T, E]`, after the last norm. Writes their keys and values.

        `run`: a backend that has begun the step of these blocks.
        """
        device = self.kv_shape.device
        ids = torch.tensor([blocks.token_ids], device=device)
        positions = torch.tensor([blocks.position_ids], device=device)
        with self._long_rows(blocks):
            hidden = self.hidden(ids, positions, run)
        run.finish()
        return hidden

    def is_long(self, num_tokens: int) -> bool:
        """Whether a row of so many tokens is a long one, which shares nothing with others."""
        return self.long_rope is not None and num_tokens > self.long_rope.most_short

    def _long_rows(self, blocks: StepBlocks) -> AbstractContextManager[None]:
        if self.long_rope is None:
            return nullcontext()
        return self.long_rope.rows(is_long_token(blocks.long_tokens, blocks.num_tokens, self.kv_shape.device))

    def hidden(self, ids: Tensor, positions: Tensor, run: StepRun) -> Tensor:
        """ids and positions `[1, T]` -> `[T, E]`. `run` is the attention of every layer."""
        if self.fused is not None:
            return self.fused(ids, positions, run)
        output = self.model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False, segue_step=run)
        return output.last_hidden_state[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden `[N, E]` -> `[N, V]` fp32."""
        return self.rounded_logits(hidden).float()

    @torch.inference_mode()
    def rounded_logits(self, hidden: Tensor) -> Tensor:
        """The same in the model's own precision: half the bytes to read, for callers that only read them."""
        return vocabulary_logits(self.model, hidden, self.fused and self.fused.head)


def tree_model(model: Any, tokenizer: Any) -> TreeModel:
    """Turn a transformers model in memory into one that runs over the tree. Raises ModelRefused if it cannot."""
    support.check_supported(model.config)
    model.eval().requires_grad_(False)
    wanted = own_logits(model)
    _register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    loaded = TreeModel(
        model,
        tokenizer,
        _kv_shape(model),
        support.max_model_len(model.config),
        eos_token_ids(model, tokenizer),
        LongRope.install(model),
    )
    loaded.fused = FusedDecoder.of(model)
    if loaded.fused is not None and not _is_right(loaded, wanted):
        loaded.fused = None
    _probe(loaded, wanted)
    return loaded


def vocabulary_logits(model: Any, hidden: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Final hidden states `[..., E]` -> `[..., V]`, scaled and capped as the transformers model does it.

    `head` replaces the model's own output embeddings.
    """
    config = model.config.get_text_config()
    logits = (head or model.get_output_embeddings())(hidden)
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    if scale != 1.0:
        logits = logits.float() * scale
    cap = getattr(config, "final_logit_softcapping", None)
    logits = torch.tanh(logits.float() / cap) * cap if cap else logits
    return logits.to(hidden.device)  # the head may be on another device


def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, tree_attention)


def _kv_shape(model: Any) -> KVShape:
    config = model.config.get_text_config()
    return KVShape(
        int(config.num_hidden_layers),
        support.num_kv_heads(config),
        support.head_dim(config),
        model.dtype,
        _device_of(model.get_decoder().layers[0]),
    )


def _device_of(layer: nn.Module) -> torch.device:
    """The device on which a layer computes. accelerate may keep its weights on another one until then."""
    hook: Any = getattr(layer, "_hf_hook", None)
    where = getattr(hook, "execution_device", None)
    if where is None:
        return next(layer.parameters()).device
    return torch.device("cuda", where) if isinstance(where, int) else torch.device(where)


def eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token id that ends an answer: those of the generation defaults and of the tokenizer."""
    found: set[int] = set()
    for ids in (model.generation_config and model.generation_config.eos_token_id, tokenizer and tokenizer.eos_token_id):
        if ids is not None:
            found |= {ids} if isinstance(ids, int) else set(ids)
    return frozenset(found)


def probe_ids(model: Any) -> list[int]:
    """A few token ids that every vocabulary has."""
    vocab_size = int(model.config.get_text_config().vocab_size)
    return [(7 * i + 3) % vocab_size for i in range(9)]


@torch.no_grad()
def own_logits(model: Any) -> Tensor:
    """`[V]`: the logits at the last probe token, by the model's own eager attention."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([probe_ids(model)], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0, -1].float()


def _probe(loaded: TreeModel, wanted: Tensor) -> None:
    """Run a short causal prompt through the tree. Raises ModelRefused if the logits differ from the model's own, or if
    its tensors have other shapes than its configuration says."""
    try:
        error = _probed_error(loaded, wanted)
    except ValueError as problem:
        raise ModelRefused(f"model of type {loaded.model.config.model_type!r} is not supported: {problem}") from problem
    if not error <= _tolerance(loaded):
        raise ModelRefused(
            f"model of type {loaded.model.config.model_type!r} is not supported: over the tree its logits differ from "
            f"its own by {error:.2%} of their norm"
        )


def _is_right(loaded: TreeModel, wanted: Tensor) -> bool:
    try:
        return _probed_error(loaded, wanted) <= _tolerance(loaded)
    except ValueError:
        return False


def _tolerance(loaded: TreeModel) -> float:
    """A share of the logits' norm. Where activations have few bits, a small difference in attention changes many."""
    is_quantized = getattr(loaded.model.config, "quantization_config", None) is not None
    return QUANTIZED_TOLERANCE if is_quantized else PROBE_TOLERANCE[loaded.kv_shape.dtype]


def _probed_error(loaded: TreeModel, wanted: Tensor) -> float:
    """How far the tree's logits are from the model's own, as a share of their norm."""
    got = chain_logits(loaded, [Segment(tuple(probe_ids(loaded.model)), False)])
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-6))


def chain_logits(loaded: TreeModel, segments: list[Segment]) -> Tensor:
    """`[V]`: the logits after one chain of segments, in one forward pass with memory of its own."""
    backend = make_backend("auto", loaded.kv_shape, loaded.layer_devices)
    memory = backend.new_memory(loaded.kv_shape, loaded.kv_shape.bytes_per_token * num_tokens(segments))
    nodes = NodeCache(memory)
    end = nodes.insert(segments)
    nodes.acquire(end)
    blocks = blocks_of(end.path(), [])
    return loaded.logits(loaded.forward(blocks, backend.begin(blocks, (), memory))[-1:])[0]
