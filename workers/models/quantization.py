"""Weights of fewer bits, by transformers' own quantisation: what a job asks for, or how a checkpoint was saved.

The package of a method does the work and says what it needs. Here its errors become reasons for refusing. Keys and
values stay in the model's precision.
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
    """How the weights of a model are, or will be, quantised."""

    wanted: Any | None  # transformers' configuration for loading; None if the checkpoint has its own

    def size_in_memory(self, directory: Path, config: Any, dtype: torch.dtype) -> tuple[int, int]:
        """(number of weights, their bytes). The files alone do not show how many weights there are."""
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
        except RuntimeError:  # the method wants a GPU even for this; it cannot need more than the plain weights
            return num_weights, num_weights * dtype.itemsize
        sizes = (each.numel() * quantizer.param_element_size(model, name, each) for name, each in parameters.items())
        return num_weights, math.ceil(sum(sizes))


def checked_quantization(config: Any, wanted: Mapping[str, Any] | None, *, has_adapter: bool) -> Quantization | None:
    """How the weights of a model with this configuration will be quantised; None if they stay plain.

    Raises ModelRefused for a method or option that transformers does not know, a method whose package is missing, a
    model that is quantised already, and an adapter. A missing GPU shows only when the model is loaded.
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
    """A checkpoint's own quantisation; None if its weights are plain."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return dict(found) if isinstance(found, Mapping) else found.to_dict()


def refusal(error: Exception) -> ModelRefused:
    """The error of a method or its package as a reason."""
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
        pass  # there is no GPU here
    except Exception as error:
        raise refusal(error) from error
    return built
