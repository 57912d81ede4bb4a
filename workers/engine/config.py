"""How an engine runs, as values. Knows nothing of models and rows."""

from dataclasses import dataclass
from typing import Literal

from segue.workers.devices.devices import BackendName


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine runs. Only `mask` and `seed` change an answer."""

    mask: Literal["segment", "causal"] = "causal"
    seed: int = 0
    max_model_len: int | None = None  # tokens of a row, prompt and answer; at most the model's own
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_memory_bytes: int | None = None  # None: a share of what is free once the model is loaded
    kv_memory_share: float | None = None  # see segue.workers.devices.devices.kv_memory_bytes
    enable_prefix_caching: bool = True
    backend: BackendName = "auto"
    # CUDA graphs for steps in which all rows generate; a graph is captured for each size that comes up
    decode_graphs: bool = False
