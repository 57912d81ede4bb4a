"""Builds the kernels for CPUs by the machine's own compiler, when they are first needed.

Without a compiler, or if the library does not load, there are no kernels, and torch's operations are used instead. The
library's name is a digest of its source, the compiler and the processor, so that machines may share a folder.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from segue.attention.cpu.kernels import Kernels

SOURCES = Path(__file__).with_name("cpp")
IN_ANY_ORDER = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]  # sums; keeps NaN
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", *IN_ANY_ORDER, "-Wno-psabi"]
PROCESSOR_FLAGS = {
    "x86_64": ["-march=native", "-mprefer-vector-width=512"],
    "aarch64": ["-mcpu=native"],
}

_log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def load_kernels(folder: Path) -> Kernels | None:
    """Build the library into `folder` unless it is there. None where it cannot be had; why is logged, once."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        _log.warning("no C++ compiler found (g++): attention over few keys is left to torch, which is slower")
        return None
    try:
        path = _library(compiler, folder)
        try:
            return Kernels(ctypes.CDLL(str(path)))
        except OSError:
            path.unlink()  # a crash may have torn it: the next process builds another
            raise
    except subprocess.CalledProcessError as error:
        reason = f"{compiler}: {error.stderr.strip()[-500:]}"
    except (OSError, AttributeError) as error:
        reason = str(error)
    _log.warning("the CPU kernels cannot be used, torch's slower operations are: %s", reason)
    return None


def _library(compiler: str, folder: Path) -> Path:
    """Raises CalledProcessError, OSError."""
    command = [*compiler.split(), *FLAGS, *PROCESSOR_FLAGS.get(platform.machine(), [])]
    version = _run([*compiler.split(), "--version"])
    sources = sorted(SOURCES.iterdir())
    told = [*((source.name, source.read_text()) for source in sources), *command, version, _processor()]
    path = folder / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:24]}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(folder):
        raise OSError(f"others may write to {folder}, where the kernels are kept")
    if path.exists() and _is_ours(path):
        return path
    with tempfile.TemporaryDirectory(dir=folder) as scratch, ThreadPoolExecutor() as pool:
        units = {source: f"{scratch}/{source.stem}.o" for source in sources if source.suffix == ".cpp"}
        list(pool.map(_run, ([*command, "-c", str(source), "-o", unit] for source, unit in units.items())))
        linked = f"{scratch}/kernels.so"
        _run([*compiler.split(), "-shared", *units.values(), "-o", linked])  # no -fopenmp: torch's is there already
        os.replace(linked, path)
    return path


def _run(command: Sequence[str]) -> str:
    """The command's output. Raises CalledProcessError, OSError."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _is_ours(path: Path) -> bool:
    """Whether no other user could have written it."""
    found = path.stat()
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & 0o022


def _processor() -> Sequence[str]:
    """Lines that differ between kinds of processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
