"""Memory that is freed and asked for again."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from workers.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    blocks = [torch.ones(1 << 20) for _ in range(16)]  # 4 MiB each

step()
before = faults()
step()
print(faults() - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", PROGRAM, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no mallopt")
def test_second_step_finds_the_memory_of_the_first() -> None:
    pages = 16 * (4 << 20) // 4096
    assert faults("keep") < pages / 10
    assert faults("default") > pages / 2, "the C library keeps it by itself: workers/memory.py is not needed any more"
