"""How many GPUs there are, for who may not want torch."""

import os
import sys

DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, Windows' in its Linux


def num_gpus_here() -> int:
    """GPUs that torch sees in this process; 0, without importing it, on a Linux without any card's driver."""
    if sys.platform == "linux" and not any(map(os.path.exists, DRIVERS)):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
