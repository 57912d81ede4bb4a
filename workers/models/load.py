"""Loads a model: from its name in a job to checked weights in memory, with an adapter merged into them.

How a loaded model runs over the tree is in `workers/models/tree_model.py`.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from segue.workers.devices.devices import resolve_device, resolve_dtype
from segue.workers.devices.names import DeviceMap
from segue.workers.errors import ModelRefused
from segue.workers.models.quantization import Quantization, checked_quantization, refusal
from segue.workers.models.source import locate, safetensors_directory
from segue.workers.models.support import check_device, checked_config
from segue.workers.models.tree_model import TreeModel, tree_model


def load_model(
    source: str,
    *,
    dtype: str = "auto",
    adapter: str | None = None,
    revision: str | None = None,
    device: str = "auto",
    device_map: DeviceMap = None,
    quantization: Mapping[str, Any] | None = None,
) -> TreeModel:
    """Load a model, check it and probe it.

    `device_map` says where the layers of a model go that is larger than a device. `quantization` is transformers' own
    configuration of weights of fewer bits. Raises ModelRefused with the reason.
    """
    directory = safetensors_directory(locate(source, revision))
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, torch_device)
    config, tokenizer = checked_config(directory)
    check_device(config, on_gpu=torch_device.type == "cuda")
    quantized = checked_quantization(config, quantization, has_adapter=adapter is not None)
    if quantized is not None:
        device_map = device_map or ({"": str(torch_device)} if torch_device.type != "cpu" else None)
        return tree_model(_load_quantized(directory, config, torch_dtype, device_map, quantized), tokenizer)
    # An adapter is merged in fp32, so that the sum is rounded only once.
    model = load_weights(directory, config, torch.float32 if adapter else torch_dtype, device_map)
    if adapter:
        model = merge_adapter(model, adapter).to(torch_dtype)
    return tree_model(model if device_map else model.to(torch_device), tokenizer)


def load_weights(
    directory: Path, config: Any, dtype: torch.dtype, device_map: DeviceMap = None, quantization: Any | None = None
) -> Any:
    """The transformers model of a checked directory, with its own eager attention. Raises ModelRefused."""
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ModelRefused("a model on several devices needs the accelerate package: pip install 'segue[gpu]'")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {} if quantization is None else {"quantization_config": quantization}
    return AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        attn_implementation="eager",
        device_map=device_map,
        **options,
    )


def _load_quantized(
    directory: Path, config: Any, dtype: torch.dtype, device_map: DeviceMap, quantized: Quantization
) -> Any:
    try:
        return load_weights(directory, config, dtype, device_map, quantized.wanted)
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError) as error:
        raise refusal(error) from error


def merge_adapter(model: Any, adapter: str) -> Any:
    """The model with an adapter's weights added to its own. Raises ModelRefused if it is not a PEFT adapter."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelRefused("model.adapter needs the peft package: pip install 'segue[finetune]'") from error
    if not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise ModelRefused(f"model.adapter: {adapter!r} has no adapter_model.safetensors")
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()
