"""Where an engine computes: its device and precision, its attention backend, and the memory for keys and values.

Knows torch's devices; no model, no Ray.
"""

import gc
import os
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from segue.attention.backend import Backend
from segue.attention.cpu.backend import KernelBackend
from segue.attention.cpu.building import load_kernels
from segue.attention.cpu.by_torch import TorchBackend
from segue.attention.cpu.kernels import DTYPES as KERNEL_DTYPES
from segue.attention.cpu.kernels import Kernels
from segue.attention.cuda.backend import FLASH_DTYPES, CudaBackend
from segue.attention.memory.budget import KVShape
from segue.attention.reference import ReferenceBackend
from segue.workers.devices.cache import cache_root
from segue.workers.devices.memory import GPU_KV_SHARE, KV_SHARE, free_memory_bytes
from segue.workers.errors import ModelRefused

BackendName = Literal["auto", "native", "cpu", "reference", "varlen"]
RESERVED_SHARE = 0.9  # of what is free on a GPU, at most

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BACKENDS: dict[str, Callable[[Sequence[torch.device]], Backend]] = {
    "native": lambda _: KernelBackend(_wanted_kernels()),
    "cpu": lambda _: TorchBackend(),
    "reference": lambda _: ReferenceBackend(),
    "varlen": lambda layer_devices: CudaBackend(layer_devices=layer_devices),
}


def resolve_device(device: str) -> torch.device:
    """`auto` is a GPU if this process sees one. Raises ModelRefused for `cuda` where there is none."""
    if device not in ("auto", "cpu", "cuda"):
        raise ModelRefused(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelRefused(
            "a GPU was asked for, and torch sees none in this process: is a CUDA build of torch installed, and does "
            "CUDA_VISIBLE_DEVICES name a device?"
        )
    is_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")


def resolve_dtype(dtype: str, device: torch.device | None = None) -> torch.dtype:
    """`auto` is bf16 where the hardware computes it, else fp16 on a GPU and fp32 on a CPU.

    `device` is where the model will run; None is this machine's. Raises ModelRefused for fp16 on a CPU, and for fp32 on
    a GPU, where the attention kernels do not compute it.
    """
    device = device or resolve_device("auto")
    if device.type == "cuda" and dtype == "auto" and not torch.cuda.is_available():
        return torch.bfloat16  # the GPUs are elsewhere; those without bf16 are eight years old
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if cpu_multiplies_bf16() else torch.float32
    if dtype not in DTYPES:
        raise ModelRefused(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    if device.type == "cpu" and dtype == "float16":
        raise ModelRefused("dtype float16 is slow and unsafe on a CPU; use bfloat16 or float32")
    if device.type == "cuda" and DTYPES[dtype] not in FLASH_DTYPES:
        raise ModelRefused(f"dtype {dtype} is not computed by the attention kernels of GPUs; use bfloat16 or float16")
    return DTYPES[dtype]


def cpu_multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this processor: on x86 that takes AVX-512 or avx_ne_convert.

    Elsewhere bf16 works too, by torch's own loops, but is slower than fp32, and oneDNN refuses to pack such weights.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def make_backend(name: str, shape: KVShape, layer_devices: Sequence[torch.device]) -> Backend:
    """`auto` is varlen on a GPU, else native where its kernels can be had, else cpu.

    Raises ModelRefused for native where they cannot.
    """
    if name == "auto":
        is_native = shape.device.type == "cpu" and shape.dtype in KERNEL_DTYPES and cpu_kernels() is not None
        name = "varlen" if shape.device.type == "cuda" else "native" if is_native else "cpu"
    return BACKENDS[name](layer_devices)


def cpu_kernels() -> Kernels | None:
    """The compiled kernels of this machine; None if it has no compiler, or SEGUE_CPU_KERNELS is 0."""
    return None if os.environ.get("SEGUE_CPU_KERNELS") == "0" else load_kernels(cache_root() / "kernels")


def _wanted_kernels() -> Kernels:
    kernels = cpu_kernels()
    if kernels is None:
        raise ModelRefused("the backend native wants a C++ compiler (g++) on this machine; cpu does without")
    return kernels


def kv_memory_bytes(layer_devices: Sequence[torch.device], share: float | None) -> tuple[int, str]:
    """The bytes that keys and values of all layers may take now, and in words where that number comes from.

    `share` is of a CPU's free memory, or of a GPU's whole memory, weights included. None is the default of each.
    """
    if layer_devices[0].type != "cuda":
        share = KV_SHARE if share is None else share
        return int(share * free_memory_bytes()), f"{share:.0%} of what is free"
    share = GPU_KV_SHARE if share is None else share
    # Each device holds the keys of its own layers.
    found = min(_free_on(each, share) * len(layer_devices) // layer_devices.count(each) for each in {*layer_devices})
    return found, f"{share:.0%} of the GPU, less weights"


def _free_on(device: torch.device, share: float) -> int:
    gc.collect()  # an engine that is no longer used may still hold memory
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - used  # torch keeps it for this process
    return max(0, min(int(share * total) - used, int(RESERVED_SHARE * free)))
