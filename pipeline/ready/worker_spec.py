"""What a worker process must know of its job: small, and the same for every worker."""

from dataclasses import dataclass, field
from typing import Any

from segue.workers.devices.names import Device, DeviceMap
from segue.workers.prompts.reasoning import ReasoningMarkers
from segue.workers.rows.params import SamplingParams
from segue.workers.scoring.template import Task


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker must know; no secret, no handle."""

    name: str  # of the job
    output: str
    fingerprint: str
    source: str  # of the model, or echo
    revision: str | None
    adapter: str | None
    dtype: str
    quantization: dict[str, Any] | None  # transformers' own configuration
    mask: str
    task: Task
    params: SamplingParams
    has_row_params: bool
    max_model_len: int
    reasoning: ReasoningMarkers | None = None  # by which it is split from answers; None: it is not
    engine: dict[str, Any] = field(default_factory=dict)  # EngineConfig fields
    threads: int | None = None
    drain_timeout_s: float = 10.0  # how long units in flight may go on after a request to drain
    device: Device = "auto"
    device_map: DeviceMap = None  # auto: layers on all the GPUs that the worker has
