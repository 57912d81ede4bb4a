"""A model's own attention weights for one prompt under a mask, for pictures.

transformers' eager attention computes them with the dense mask, so they show what the rule does, not what our kernels
do.

Shapes: `T` tokens, `L` layers, `H` heads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segue.attention.segments import Segment, canonical_segments
from segue.attention.visibility import block_sequence_ids, visible
from segue.workers.models.load import load_weights, merge_adapter
from segue.workers.models.source import locate, safetensors_directory
from segue.workers.models.support import checked_config, layer_windows

MAX_TOKENS = 1024  # the weights of all layers and heads are in memory together: a gigabyte for SmolLM2-135M


def load_for_maps(source: str, *, adapter: str | None = None, revision: str | None = None) -> Any:
    """The transformers model, in fp32. Raises ModelRefused."""
    directory = safetensors_directory(locate(source, revision))
    config, _ = checked_config(directory)
    model = load_weights(directory, config, torch.float32)
    return (merge_adapter(model, adapter) if adapter else model).eval()


@torch.no_grad()
def attention_map(model: Any, segments: Sequence[Segment], mask: str, layer: int | None = None) -> Tensor:
    """`[T, T]`, query by key: the mean over all heads of one layer, or of all layers. Each row sums to 1.

    Raises ValueError for a layer that the model does not have, or a prompt of more than MAX_TOKENS.
    """
    chain = canonical_segments(segments, mask=mask)
    ids = torch.tensor([[token for segment in chain for token in segment.token_ids]])
    if ids.shape[1] > MAX_TOKENS:
        raise ValueError(f"a picture of {ids.shape[1]:,} tokens shows nothing; wanted at most {MAX_TOKENS:,}")
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    if layer is not None and not 0 <= layer < num_layers:
        raise ValueError(f"the model has layers 0 to {num_layers - 1}, got {layer}")
    masks = _masks(model.config, block_sequence_ids(chain))
    maps = model(input_ids=ids, attention_mask=masks, use_cache=False, output_attentions=True).attentions
    chosen = maps if layer is None else maps[layer : layer + 1]
    return torch.stack([each[0].mean(0) for each in chosen]).mean(0)


def _masks(config: Any, segment_ids: Tensor) -> Tensor | dict[str, Tensor]:
    """The additive mask `[1, 1, T, T]` of all layers, or one for each kind of layers if the model takes several."""
    text = config.get_text_config()
    windows = layer_windows(config)
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        return _bias(segment_ids, windows[0])
    return {kind: _bias(segment_ids, window) for kind, window in zip(kinds, windows, strict=True)}


def _bias(segment_ids: Tensor, window: int | None) -> Tensor:
    may_see = visible(segment_ids, window)
    return torch.zeros(may_see.shape).masked_fill(~may_see, torch.finfo(torch.float32).min)[None, None]
