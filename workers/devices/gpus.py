"""How many GPUs there are. Imports torch only if there may be one."""

import os
import sys

# NVIDIA's before and after its first use, those of NVIDIA's small computers, AMD's, and Windows' in its Linux.
DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")


def may_be_there() -> bool:
    """Whether a card's driver is there, as far as files can tell."""
    return sys.platform != "linux" or any(map(os.path.exists, DRIVERS))


def num_gpus_here() -> int:
    """The GPUs that torch sees in this process; 0, without importing it, on a Linux that has no card's driver."""
    if not may_be_there():
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
