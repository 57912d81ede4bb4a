"""Memory that is freed and asked for again."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from segue.workers.devices.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    blocks = [torch.ones((4 + n % 5) << 18) for n in range(64)]  # of 4 to 8 MiB
    while blocks:
        blocks.pop()  # the last first, as a backward pass does it

step()
before = faults()
step()
print(faults() - before)
"""
PAGES = sum((4 + n % 5) << 20 for n in range(64)) // 4096


def faults(mode: str) -> int:
    """Pages that the second step had to get from the system."""
    command = [sys.executable, "-c", PROGRAM, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no mallopt")
def test_second_step_finds_the_memory_of_the_first() -> None:
    assert faults("keep") < PAGES / 10
    assert faults("default") > PAGES / 2  # else the C library does it by itself, and workers/devices/memory.py may go
