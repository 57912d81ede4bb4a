"""The compiled half of attention on CPUs: `kernels.cpp`, built by the machine's own compiler when it is first wanted.

Where there is no compiler, or the result does not load, there are no kernels, and torch's operations do the same. The
library is kept under a name that is a digest of its source, the compiler and the processor, so that a folder may be
shared by machines. It computes with torch's threads.

Shapes: `T` packed tokens, `H` query heads, `Hkv` key heads, `D` head width, `E` hidden width, `V` vocabulary.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
IN_ANY_ORDER = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]  # sums; NaN stays
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", *IN_ANY_ORDER, "-Wno-psabi"]
PROCESSOR_FLAGS = {
    "x86_64": ["-march=native", "-mprefer-vector-width=512"],
    "aarch64": ["-mcpu=native"],
}
DTYPES = (torch.float32, torch.bfloat16)
RUN_FIELDS = 6  # as in the C++ structs of the same names
SPAN_FIELDS = 8
KEPT_FIELDS = 7

_log = logging.getLogger(__name__)


class Kernels:
    """The functions of a loaded library. Tensors are on the CPU, their last dimension dense.

    Raise TypeError unless a call's tensors are all fp32 or all bf16, ValueError unless they are dense so.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        address, number, count = ctypes.c_void_p, ctypes.c_float, ctypes.c_int64
        self._rms_norm = library.segue_rms_norm
        self._rms_norm.argtypes = [ctypes.c_int, address, address, address, count, count, number, ctypes.c_int]
        self._rotate = library.segue_rotate
        self._rotate.argtypes = [ctypes.c_int, address, address, address, count, count, count, count, ctypes.c_int]
        self._attend = library.segue_attend
        self._attend.argtypes = [
            *(ctypes.c_int, address, number),
            *(address, count, address, count, address, address, address, ctypes.c_int),
        ]
        self._summarise = library.segue_summarise
        self._summarise.argtypes = [ctypes.c_int, address, count, count, address, address, address, ctypes.c_int]
        for function in (self._rms_norm, self._rotate, self._attend, self._summarise):
            function.restype = None

    def rms_norm(self, inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """`[..., E]` over its root mean square, times weight `[E]`."""
        inputs = inputs.contiguous()
        outputs = torch.empty_like(inputs)
        width = inputs.shape[-1]
        self._rms_norm(
            _is_bf16(inputs, weight),
            inputs.data_ptr(),
            weight.data_ptr(),
            outputs.data_ptr(),
            inputs.numel() // width,
            width,
            epsilon,
            torch.get_num_threads(),
        )
        return outputs

    def rotate_(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotary positions, in place: each half of a head `[T, N, D]` is turned by the other; cos and sin `[T, D]`."""
        num_tokens, num_heads, head_dim = heads.shape
        self._rotate(
            _is_bf16(heads, cos, sin),
            heads.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            num_tokens,
            heads.stride(0),
            num_heads,
            head_dim,
            torch.get_num_threads(),
        )

    def summarise(self, logits: Tensor, *, with_totals: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Of logits `[N, V]`: the largest, `[N]` fp32, where it first is, `[N]` int64, and the log of the sum of all
        exponentials, `[N]` fp32, if asked for."""
        logits = logits.contiguous()
        highest, most_likely = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.int64)
        totals = torch.empty(len(logits) if with_totals else 0)
        self._summarise(
            _is_bf16(logits),
            logits.data_ptr(),
            *logits.shape,
            highest.data_ptr(),
            most_likely.data_ptr(),
            totals.data_ptr() if with_totals else None,
            torch.get_num_threads(),
        )
        return highest, most_likely, totals

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        *,
        kept: array,
        runs: array,
        spans: array,
        parts: array,
        indices: array,
    ) -> Tensor:
        """query `[H, T, D]`, key and value `[Hkv, T, D]` of a step's tokens -> `[T, H, D]`.

        First the keys and values that `kept` names are copied to where they stay. Every query belongs to one of `runs`:
        queries `[start, stop)` that see the same `spans[first:end]` of keys, and that have attended to the same parts
        before, `parts[i]` for i in `indices[first:end]`. A span's keys are the step's own or at an address. All are
        rows of int64, field by field as in kernels.cpp.
        """
        num_heads, num_tokens, head_dim = query.shape
        out = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype)
        step = array("q", (query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr()))
        for tensor in (query, key, value):
            step.extend(tensor.stride()[:2])
        step.extend((len(key), num_heads // len(key), head_dim, layer))
        self._attend(
            _is_bf16(query, key, value),
            step.buffer_info()[0],
            scale,
            kept.buffer_info()[0],
            len(kept) // KEPT_FIELDS,
            runs.buffer_info()[0],
            len(runs) // RUN_FIELDS,
            spans.buffer_info()[0],
            parts.buffer_info()[0],
            indices.buffer_info()[0],
            torch.get_num_threads(),
        )
        return out


def _is_bf16(*tensors: Tensor) -> bool:
    """Raises TypeError unless all are of one type that the kernels read, ValueError unless each row is dense."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES or any(tensor.dtype != dtype for tensor in tensors):
        raise TypeError(f"wanted tensors all fp32 or all bf16, got {[tensor.dtype for tensor in tensors]}")
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError(f"wanted a dense last dimension, got strides {[tensor.stride() for tensor in tensors]}")
    return dtype == torch.bfloat16


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
            path.unlink()  # torn by a crash, say: the next process builds another
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
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=True).stdout
    told = [SOURCE.read_text(), *command, version, _processor()]
    path = folder / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:24]}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(folder):
        raise OSError(f"others may write to {folder}, where the kernels are kept")
    if path.exists() and _is_ours(path):
        return path
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unlinked, linked = f"{scratch}/kernels.o", f"{scratch}/kernels.so"
        for step in (
            [*command, "-c", str(SOURCE), "-o", unlinked],
            [*compiler.split(), "-shared", unlinked, "-o", linked],  # no -fopenmp: torch's is there already
        ):
            subprocess.run(step, capture_output=True, text=True, check=True)
        os.replace(linked, path)
    return path


def _is_ours(path: Path) -> bool:
    """Whether nobody else could have put there what it has."""
    found = path.stat()
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & 0o022


def _processor() -> Sequence[str]:
    """What tells one kind of processor from another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
