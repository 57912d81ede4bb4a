"""How many GPUs there are, for who may not want torch."""

import os
import sys

# NVIDIA's, before and after its first use, and those of its small computers; AMD's; Windows' in its Linux.
DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")


def may_be_there() -> bool:
    """Whether there is a driver of a card, as far as files can tell."""
    return sys.platform != "linux" or any(map(os.path.exists, DRIVERS))


def num_gpus_here() -> int:
    """GPUs that torch sees in this process; 0, without importing it, on a Linux without any card's driver."""
    if not may_be_there():
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
