"""What a plan must know of a model before its weights are loaded: identity, limits, precision, mask.

Imports neither torch nor transformers, which take seconds. What needs them is in `workers/models/inspect.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segue.workers.devices.gpus import num_gpus_here
from segue.workers.errors import ModelRefused
from segue.workers.models import echo
from segue.workers.models.adapter_record import AdapterRecord, load_record
from segue.workers.models.source import file_digest, locate, safetensors_directory, weights_identity


@dataclass(frozen=True, slots=True)
class ConfigFacts:
    """What configuration, tokenizer and headers of weights say."""

    dtype: str  # resolved: float32, bfloat16 or float16
    max_model_len: int  # tokens of prompt and answer together
    num_weights: int = 0
    weight_bytes: int = 0  # in memory, in this dtype
    kv_bytes_per_token: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts(ConfigFacts):
    """A model as the fingerprint and the plan know it."""

    identity: str  # sha256 of weights, configuration and tokenizer
    commit: str | None = None  # of a hub id; every worker loads it, whatever the branch points to by then
    adapter_identity: str | None = None
    adapter_record: AdapterRecord | None = None  # what the adapter was trained for

    @property
    def adapter_mask(self) -> str | None:
        """segment or causal, if the adapter's record names it."""
        return self.adapter_record.mask if self.adapter_record else None


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model's files. Nothing of them has been loaded."""

    directory: Path | None  # None for the echo, which has no files
    identity: str
    commit: str | None = None
    adapter_identity: str | None = None
    adapter_record: AdapterRecord | None = None


def find_model(source: str, *, adapter: str | None, revision: str | None) -> FoundModel:
    """Find a model. Downloads and converts it if needed. Raises ModelRefused."""
    if echo.is_echo(source):
        return FoundModel(None, echo.SOURCE)
    files = locate(source, revision)
    return FoundModel(
        safetensors_directory(files).absolute(),
        weights_identity(files),
        files.commit,
        adapter_identity=None if adapter is None else _adapter_identity(Path(adapter)),
        adapter_record=None if adapter is None else load_record(Path(adapter)),
    )


def inspect_model(
    found: FoundModel,
    look: Callable[..., ConfigFacts],
    *,
    dtype: str,
    quantization: Mapping[str, Any] | None = None,
    on_gpu: bool | None = None,
) -> ModelFacts:
    """Check a model.

    `look` calls `segue.workers.models.inspect.config_facts`, in this process or in another one. `on_gpu` says whether
    the model will run on GPUs, perhaps of other machines; None means as on this machine.

    Raises ModelRefused for whatever would fail on the workers, as far as the files show it.
    """
    if found.directory is None:
        return ModelFacts(identity=found.identity, dtype="float32", max_model_len=echo.MAX_MODEL_LEN)
    if num_gpus_here() and on_gpu is not False:
        dtype, on_gpu = _dtype_here(dtype), True  # only this process may ask what the card can
    has_adapter = found.adapter_identity is not None
    facts = look(found.directory, dtype=dtype, quantization=quantization, has_adapter=has_adapter, on_gpu=on_gpu)
    return ModelFacts(
        **asdict(facts),
        identity=found.identity,
        commit=found.commit,
        adapter_identity=found.adapter_identity,
        adapter_record=found.adapter_record,
    )


def _dtype_here(dtype: str) -> str:
    from segue.workers.devices.devices import resolve_dtype

    return str(resolve_dtype(dtype)).removeprefix("torch.")


def _adapter_identity(adapter: Path) -> str:
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelRefused(f"model.adapter: {str(adapter)!r} has no adapter_model.safetensors")
    return f"{file_digest(weights)}:{file_digest(adapter / 'adapter_config.json')}"
