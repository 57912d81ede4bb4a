"""What a model's configuration, tokenizer and headers of weights say, read by torch and transformers.

A job does this in another process (`pipeline/prompts/check.py`): the files are strangers', and importing both takes
seconds, in which a run can start Ray.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from segue.workers.devices.devices import resolve_dtype
from segue.workers.models import support
from segue.workers.models.facts import ConfigFacts
from segue.workers.models.quantization import checked_quantization
from segue.workers.models.support import checked_config


def import_models() -> None:
    """Import in advance what takes seconds."""
    import transformers.modeling_utils  # noqa: F401


def config_facts(
    directory: Path, *, dtype: str, quantization: Mapping[str, Any] | None, has_adapter: bool, on_gpu: bool | None
) -> ConfigFacts:
    """The facts of a model directory. Raises ModelRefused if the model is not supported."""
    config, _ = checked_config(directory)
    resolved = resolve_dtype(dtype, None if on_gpu is None else torch.device("cuda" if on_gpu else "cpu"))
    support.check_device(config, on_gpu=torch.cuda.is_available() if on_gpu is None else on_gpu)
    quantized = checked_quantization(config, quantization, has_adapter=has_adapter)
    if quantized is not None:
        num_weights, weight_bytes = quantized.size_in_memory(directory, config, resolved)
    else:
        num_weights = support.num_weights(directory)
        weight_bytes = num_weights * resolved.itemsize
    return ConfigFacts(
        dtype=str(resolved).removeprefix("torch."),
        max_model_len=support.max_model_len(config),
        num_weights=num_weights,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=support.kv_bytes_per_token(config, resolved.itemsize),
    )
