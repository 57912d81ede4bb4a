"""Weights of fewer bits, by transformers' own quantisation: what a job asks for, or what a checkpoint was saved in.

A method's package does the work, and says what it needs; here its answers become reasons. Keys and values stay in the
model's precision.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from segue.workers.errors import ModelRefused


@dataclass(frozen=True, slots=True)
class Quantization:
    """Of a model whose weights are, or will be, quantised."""

    wanted: Any | None  # transformers' configuration of what is done while loading; None for a checkpoint's own

    def size_in_memory(self, directory: Path, config: Any, dtype: torch.dtype) -> tuple[int, int]:
        """(weights, their bytes). The files alone do not tell how many weights there are."""
        from transformers import AutoModelForCausalLM
        from transformers.quantizers.auto import AutoHfQuantizer

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        parameters = dict(model.named_parameters())
        num_weights = sum(map(torch.numel, parameters.values()))
        if self.wanted is None:
            return num_weights, sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        quantizer = AutoHfQuantizer.from_config(self.wanted, pre_quantized=False)
        try:
            quantizer.preprocess_model(model, dtype=dtype)
        except RuntimeError:  # it wants a GPU even for that: the weights as they are now are the most there can be
            return num_weights, num_weights * dtype.itemsize
        sizes = (each.numel() * quantizer.param_element_size(model, name, each) for name, each in parameters.items())
        return num_weights, math.ceil(sum(sizes))


def checked_quantization(config: Any, wanted: Mapping[str, Any] | None, *, has_adapter: bool) -> Quantization | None:
    """What becomes of the weights of a model with this configuration; None if they are plain and stay so.

    Raises ModelRefused for a method or option that transformers does not know, one whose package is missing, a model
    that is quantised already, and an adapter. Whether there is the GPU that a method may want shows when it is loaded.
    """
    own = own_quantization(config)
    given = own if wanted is None else wanted
    if given is None:
        return None
    if own is not None and wanted is not None:
        raise ModelRefused(
            f"model.quantization: the model's weights are quantised already ({own.get('quant_method')}): leave it out"
        )
    if has_adapter:
        raise ModelRefused(
            "model.adapter: an adapter is added to weights in fp32, and these are quantised: merge it into the model "
            "first"
        )
    built = _built(given, is_own=own is not None)
    return Quantization(None if wanted is None else built)


def own_quantization(config: Any) -> dict[str, Any] | None:
    """What a checkpoint says of its weights, if they are quantised."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return dict(found) if isinstance(found, Mapping) else found.to_dict()


def refusal(error: Exception) -> ModelRefused:
    """What a method or its package says against it, as a reason."""
    first_line = (str(error).splitlines() or [""])[0]
    return ModelRefused(f"model.quantization: {type(error).__name__}: {first_line}")


def _built(given: Mapping[str, Any], *, is_own: bool) -> Any:
    """transformers' configuration. Raises ModelRefused."""
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    try:
        built = AutoQuantizationConfig.from_dict(dict(given))
        quantizer = AutoHfQuantizer.from_config(built, pre_quantized=is_own)
    except Exception as error:
        raise refusal(error) from error
    try:
        quantizer.validate_environment()
    except RuntimeError:
        pass  # no GPU here
    except Exception as error:
        raise refusal(error) from error
    return built
