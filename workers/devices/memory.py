"""The memory of this process: how much it may still take, and whether the C library keeps what is freed.

Knows nothing of tensors.
"""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_MMAP_THRESHOLD = 32 << 20  # the largest that glibc accepts
NEVER = -1
KV_SHARE = 0.4  # of free memory, for keys and values; the rest is for what a step computes, and for other processes
GPU_KV_SHARE = 0.85  # of a GPU's memory, weights included; the rest is for what a step computes

OWN_GROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
# For each version of control groups: limit, usage, and the entry of memory.stat for cached files, which can be dropped.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def keep_freed_memory() -> bool:
    """From now on this process keeps the memory that it frees. False where the C library has no such setting.

    By default glibc gives large blocks back to the system, and gets them again page by page, zeroed. A training step
    frees what it computed, and the next one needs as much: these pages take a sixth of its time (SmolLM2-135M, two
    cores).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))


def free_memory_bytes() -> int:
    """Free memory of the machine, or within the limits of a container or batch job if that is less."""
    return max(0, min([psutil.virtual_memory().available, *_free_in_groups()]))


def _free_in_groups() -> Iterator[int]:
    """The free bytes of each control group that has a limit, from the process's own up to the root that it can see."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, names = (CGROUPS / "memory", _V1) if controllers else (CGROUPS, _V2)
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            yield from _free_in_group(folder, *names)
            if folder == top:
                break


def _free_in_group(folder: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    try:
        allowed, used = (folder / limit).read_text(), int((folder / usage).read_text())
        entries = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
    except OSError:
        return  # the group is not there, or not mounted here
    if allowed.strip() != "max":
        yield int(allowed) - used + sum(int(value) for name, value in entries if name == cache)
