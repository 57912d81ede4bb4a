"""Every backend of attention that this machine can run, for tests on random trees."""

import torch
from tree_harness import HKV
from varlen_emulation import EmulatedBackend

from segue.attention.cpu.backend import FEW_PAIRS, KernelBackend
from segue.attention.cpu.by_torch import TorchBackend
from segue.attention.memory.budget import KVShape
from segue.attention.reference import ReferenceBackend
from segue.workers.devices.devices import cpu_kernels

KERNELS = cpu_kernels()
NATIVE = {"native": FEW_PAIRS, "kernel alone": 1 << 40, "kernel merging": 0} if KERNELS else {}  # by few_pairs


class TiledBackend(KernelBackend):
    """Is tested where tiles multiply: in bf16, with wider heads."""

    shape = KVShape(1, HKV, 32, torch.bfloat16)


TILED = NATIVE if KERNELS and KERNELS.multiplies(TiledBackend.shape.head_dim) else {}
BACKENDS = [TorchBackend(), ReferenceBackend(), EmulatedBackend()]
BACKENDS += [KernelBackend(KERNELS, few_pairs) for few_pairs in NATIVE.values() if KERNELS]
BACKENDS += [TiledBackend(KERNELS, few_pairs) for few_pairs in TILED.values() if KERNELS]
NAMES = ["cpu", "reference", "varlen", *NATIVE, *(f"{name}, tiles" for name in TILED)]
