"""Weights of fewer bits, by transformers' own quantisation: what a job asks for, or what a checkpoint was saved in.

A method's package does the work, and says what it needs; here its answers become reasons. Keys and values stay in the
model's precision.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from workers.model_source import ModelRefused

ADAPTER_OVER_QUANTIZED = (
    "model.adapter: an adapter is added to weights in fp32, and these are quantised: merge it into the model first"
)


def checked_quantization(config: Any, wanted: Mapping[str, Any] | None) -> Any | None:
    """transformers' quantisation configuration for `wanted`; None if nothing is wanted.

    `config` is the model's own. Raises ModelRefused for a method or option that transformers does not know, one whose
    package is missing, and a model that is quantised already. A checkpoint's own method is checked as well.
    """
    own = own_quantization(config)
    if wanted is not None and own is not None:
        raise ModelRefused(
            f"model.quantization: the model's weights are quantised already ({own.get('quant_method')}): leave it out"
        )
    given = wanted if wanted is not None else own
    if given is None:
        return None
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    try:
        built = AutoQuantizationConfig.from_dict(dict(given))
        AutoHfQuantizer.from_config(built, pre_quantized=own is not None).validate_environment()
    except ImportError as error:
        raise ModelRefused(f"model.quantization: a package is missing: {_first_line(error)}") from error
    except Exception as error:
        if own is not None and isinstance(error, RuntimeError):
            return None  # wants a GPU, which is for the worker to tell
        raise ModelRefused(f"model.quantization: {type(error).__name__}: {_first_line(error)}") from error
    return built if wanted is not None else None


def own_quantization(config: Any) -> dict[str, Any] | None:
    """What a checkpoint says of its weights, if they are quantised."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return dict(found) if isinstance(found, Mapping) else found.to_dict()


def size_in_memory(directory: Path, config: Any, wanted: Any | None, dtype: torch.dtype) -> tuple[int, int]:
    """(weights, their bytes) of a quantised model, of which the files alone do not tell how many weights it has."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    parameters = dict(model.named_parameters())
    num_weights = sum(parameter.numel() for parameter in parameters.values())
    if wanted is None:
        return num_weights, sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    quantizer = AutoHfQuantizer.from_config(wanted, pre_quantized=False)
    quantizer.preprocess_model(model, dtype=dtype)
    sizes = [each.numel() * quantizer.param_element_size(model, name, each) for name, each in parameters.items()]
    return num_weights, int(sum(sizes))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
