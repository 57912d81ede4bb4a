"""What a plan must know of a model, found out without loading its weights: identity, limits, precision, mask.

Raises ModelRefused for everything that would fail later on the workers, as far as files can tell.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workers import echo, support
from workers.adapter_record import AdapterRecord, load_record
from workers.devices import resolve_dtype
from workers.model import checked_config
from workers.model_source import ModelRefused, file_digest, locate, safetensors_directory, weights_identity
from workers.quantization import checked_quantization


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model, as the fingerprint and the plan see it."""

    identity: str  # sha256 of weights, configuration and tokenizer
    commit: str | None  # of a hub id: what every worker must load, whatever its branch points to by then
    adapter_identity: str | None
    adapter_record: AdapterRecord | None  # what the adapter says it was trained for
    dtype: str  # resolved: float32, bfloat16 or float16
    max_model_len: int  # tokens of prompt and answer
    window: int | None  # the sliding window that limits it, if one does
    num_weights: int = 0
    weight_bytes: int = 0  # in memory, in this dtype
    kv_bytes_per_token: int = 0

    @property
    def adapter_mask(self) -> str | None:
        """segment or causal, if the adapter says."""
        return self.adapter_record.mask if self.adapter_record else None


def inspect_model(
    source: str,
    *,
    dtype: str,
    adapter: str | None,
    revision: str | None,
    quantization: Mapping[str, Any] | None = None,
    on_gpu: bool | None = None,
) -> ModelFacts:
    """Find, convert if needed, and check a model. `source: echo` has no weights and no limits.

    `on_gpu`: whether it will compute on GPUs, maybe of other machines; None is as on this one.
    """
    if echo.is_echo(source):
        return ModelFacts(echo.SOURCE, None, None, None, "float32", echo.MAX_MODEL_LEN, None)
    files = locate(source, revision)
    directory = safetensors_directory(files)
    config, _ = checked_config(directory)
    resolved = resolve_dtype(dtype, None if on_gpu is None else torch.device("cuda" if on_gpu else "cpu"))
    quantized = checked_quantization(config, quantization, has_adapter=adapter is not None)
    if quantized is not None:
        num_weights, weight_bytes = quantized.size_in_memory(directory, config, resolved)
    else:
        num_weights = support.num_weights(directory)
        weight_bytes = num_weights * resolved.itemsize
    return ModelFacts(
        identity=weights_identity(files),
        commit=files.commit,
        adapter_identity=None if adapter is None else _adapter_identity(Path(adapter)),
        adapter_record=None if adapter is None else load_record(Path(adapter)),
        dtype=str(resolved).removeprefix("torch."),
        max_model_len=support.max_model_len(config),
        window=support.sliding_window(config),
        num_weights=num_weights,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_bytes_per_token(config, resolved.itemsize),
    )


def kv_bytes_per_token(config: Any, bytes_per_number: int) -> int:
    """Of all layers."""
    text = config.get_text_config()
    return 2 * int(text.num_hidden_layers) * support.num_kv_heads(text) * support.head_dim(text) * bytes_per_number


def _adapter_identity(adapter: Path) -> str:
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelRefused(f"model.adapter: {str(adapter)!r} has no adapter_model.safetensors")
    return f"{file_digest(weights)}:{file_digest(adapter / 'adapter_config.json')}"
