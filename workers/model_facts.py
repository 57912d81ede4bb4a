"""What a plan must know of a model, found out without loading its weights: identity, limits, precision, mask.

Raises ModelRefused for everything that would fail later on the workers, as far as files can tell.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from workers import echo, support
from workers.model import checked_config, resolve_dtype
from workers.model_source import ModelRefused, file_digest, locate, safetensors_directory, weights_identity

ADAPTER_RECORD = "segue.json"  # beside adapter_model.safetensors: the mask it was trained under


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model, as the fingerprint and the plan see it."""

    identity: str  # sha256 of weights, configuration and tokenizer
    commit: str | None  # of a hub id: what every worker must load, whatever its branch points to by then
    adapter_identity: str | None
    adapter_mask: str | None  # segment or causal, if the adapter says
    dtype: str  # resolved: float32, bfloat16 or float16
    max_model_len: int  # tokens of prompt and answer
    window: int | None  # the sliding window that limits it, if one does


def inspect_model(source: str, *, dtype: str, adapter: str | None, revision: str | None) -> ModelFacts:
    """Find, convert if needed, and check a model. `source: echo` has no weights and no limits."""
    if echo.is_echo(source):
        return ModelFacts(echo.SOURCE, None, None, None, "float32", echo.MAX_MODEL_LEN, None)
    files = locate(source, revision)
    config, _ = checked_config(safetensors_directory(files))
    return ModelFacts(
        identity=weights_identity(files),
        commit=files.commit,
        adapter_identity=None if adapter is None else _adapter_identity(Path(adapter)),
        adapter_mask=None if adapter is None else _adapter_mask(Path(adapter)),
        dtype=str(resolve_dtype(dtype)).removeprefix("torch."),
        max_model_len=support.max_model_len(config),
        window=support.sliding_window(config),
    )


def _adapter_identity(adapter: Path) -> str:
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelRefused(f"model.adapter: {str(adapter)!r} has no adapter_model.safetensors")
    return f"{file_digest(weights)}:{file_digest(adapter / 'adapter_config.json')}"


def _adapter_mask(adapter: Path) -> str | None:
    record = adapter / ADAPTER_RECORD
    if not record.is_file():
        return None
    mask = json.loads(record.read_text()).get("mask")
    if mask not in ("segment", "causal"):
        raise ModelRefused(f"{record}: mask must be segment or causal, got {mask!r}")
    return mask
