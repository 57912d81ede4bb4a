"""The compiled kernels for CPUs, `cpp/`, as functions of tensors. `attention/cpu/building.py` compiles them.

They compute with torch's threads. On processors with AMX they also multiply bf16 by tiles: see `Kernels.multiplies`.

Shapes: `T` packed tokens, `H` query heads, `Hkv` key heads, `D` head width, `E` hidden width, `V` vocabulary.
"""

import ctypes
from array import array
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from segue.attention.backend import LayerAttention

DTYPES = (torch.float32, torch.bfloat16)
RUN_FIELDS = 6  # as in the C++ structs of the same names
SPAN_FIELDS = 9
KEPT_FIELDS = 7
BLOCK_FIELDS = 11
PART_FIELDS = 9
DECODER_FIELDS = 6
LAYER_FIELDS = 12
ALL_SEEN = -(1 << 40)  # the `first_seen` of a span without a window
TILE_INPUTS = 32  # tiles multiply a multiple of so many inputs, or of numbers of a head
PANEL_OUTPUTS = 32  # of packed weights


@dataclass(frozen=True, slots=True)
class Tables:
    """What the kernel is told of a step: rows of int64, with the fields of the structs in cpp/kernels.h.

    First the keys and values that `kept` names are copied to their memory. Every query belongs to one of `runs`:
    queries `[start, stop)` that see the same `spans[first:end]` of keys and have the same parts, those with the numbers
    `indices[first:end]`. The keys of a span are the step's own, or are at an address. With tiles, the parts are the
    results of `blocks`, which have many queries; else they are `parts`, which torch has computed.
    """

    by_tiles: bool = False
    kept: array = field(default_factory=partial(array, "q"))
    runs: array = field(default_factory=partial(array, "q"))
    spans: array = field(default_factory=partial(array, "q"))
    indices: array = field(default_factory=partial(array, "q"))
    parts: array = field(default_factory=partial(array, "q"))
    blocks: array = field(default_factory=partial(array, "q"))

    def check(self) -> None:
        """Raises ValueError unless every table has whole rows."""
        widths = {
            "kept": KEPT_FIELDS, "runs": RUN_FIELDS, "spans": SPAN_FIELDS, "parts": PART_FIELDS, "blocks": BLOCK_FIELDS,
        }  # fmt: skip
        broken = [name for name, width in widths.items() if len(getattr(self, name)) % width]
        if broken:
            raise ValueError(f"wanted whole rows of {', '.join(broken)}")

    def pointers(self) -> array:
        """The C++ struct of the same name. Valid while this object lives and no table grows."""
        kept, runs, spans, indices, parts, blocks = (
            table.buffer_info() for table in (self.kept, self.runs, self.spans, self.indices, self.parts, self.blocks)
        )
        return array(
            "q",
            (
                *(kept[0], kept[1] // KEPT_FIELDS),
                *(runs[0], runs[1] // RUN_FIELDS),
                *(spans[0], indices[0], parts[0], self.by_tiles),
                *(blocks[0], blocks[1] // BLOCK_FIELDS),
            ),
        )


class After(IntEnum):
    """What is done with the sums of a product before they are rounded. As in cpp/kernels.h."""

    NOTHING = 0
    ADD = 1
    GATE = 2


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """Weights `[N, K]` in bf16 as tiles multiply them, and a bias `[N]`."""

    numbers: Tensor
    bias: Tensor | None
    num_outputs: int
    num_inputs: int

    def pointers(self) -> tuple[int, int]:
        return self.numbers.data_ptr(), 0 if self.bias is None else self.bias.data_ptr()


class Kernels:
    """The functions of a loaded library. Tensors are on the CPU, their last dimension dense.

    They raise TypeError unless the tensors of a call are all fp32 or all bf16, and ValueError unless they are dense so
    and their shapes go together: the library reads and writes by address.
    Products by tiles need bf16 and a number of inputs for which `multiplies` is true.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        address, number, count, kind = ctypes.c_void_p, ctypes.c_float, ctypes.c_int64, ctypes.c_int
        arguments = {
            "rms_norm": [kind, address, address, address, count, count, count, count, number, kind],
            "rotate": [kind, address, address, address, count, count, count, count, kind],
            "summarise": [kind, address, count, count, address, address, address, kind],
            "attend": [kind, address, number, number, address, address, kind],
            "pack": [address, address, count, count],
            "product": [kind, address, address, address, address, address, count, count, count, kind],
            "decode": [address, address, address, address, address, address, count, number, number, kind],
            "has_tiles": [],
        }
        functions = {name: getattr(library, f"segue_{name}") for name in arguments}
        for name, function in functions.items():
            function.argtypes, function.restype = arguments[name], None
        functions["has_tiles"].restype = kind
        self._functions = SimpleNamespace(**functions)
        self._has_tiles = bool(self._functions.has_tiles())

    def rms_norm(self, inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """`[..., E]` over its root mean square, times weight `[E]`."""
        inputs = inputs.contiguous()
        outputs = torch.empty_like(inputs)
        width = inputs.shape[-1] if inputs.dim() else 0
        _check(width and weight.shape == (width,), "[..., E] and weight [E]", inputs, weight)
        self._functions.rms_norm(
            _is_bf16(inputs, weight),
            inputs.data_ptr(),
            weight.data_ptr(),
            outputs.data_ptr(),
            *(inputs.numel() // width, width, 1, width),
            epsilon,
            torch.get_num_threads(),
        )
        return outputs

    def rotate_(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotary positions, in place: each half of a head `[T, N, D]` is turned by the other; cos and sin `[T, D]`."""
        num_tokens, num_heads, head_dim = _three(heads)
        is_whole = head_dim % 2 == 0 and (heads.stride(1) == head_dim or num_heads < 2)
        angles = (num_tokens, head_dim)
        are_angles = all(each.shape == angles and each.is_contiguous() for each in (cos, sin))
        _check(is_whole and are_angles, "dense heads [T, N, D] and angles [T, D], D even", heads, cos, sin)
        self._functions.rotate(
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
        """Of logits `[N, V]`: the largest, `[N]` fp32, its first place, `[N]` int64, and with `with_totals` the
        logarithm of the sum of the exponentials of logits less the largest, `[N]` fp32, else an empty tensor."""
        _check(logits.dim() == 2 and logits.shape[-1], "logits [N, V]", logits)
        logits = logits.contiguous()
        highest, most_likely = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.int64)
        totals = torch.empty(len(logits) if with_totals else 0)
        self._functions.summarise(
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
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention, tables: Tables
    ) -> Tensor:
        """query `[H, T, D]`, key and value `[Hkv, T, D]` of a step's tokens -> `[T, H, D]`.

        `tables` holds the window already. Tiles cap no scores.
        """
        num_heads, num_tokens, head_dim = _three(query)
        num_keys = len(_three(key) and key)
        is_one_step = key.shape == value.shape and key.shape[1:] == query.shape[1:] and layer >= 0
        is_grouped = num_keys and num_heads and num_heads % num_keys == 0
        _check(is_one_step and is_grouped, "queries [H, T, D], keys and values [Hkv, T, D]", query, key, value)
        tables.check()
        out = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype)
        step = array("q", (query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr()))
        for tensor in (query, key, value):
            step.extend(tensor.stride()[:2])
        step.extend((len(key), num_heads // len(key), head_dim, layer))
        is_bf16 = _is_bf16(query, key, value)
        if tables.by_tiles and not (is_bf16 and self.multiplies(head_dim) and how.softcap is None):
            raise ValueError(f"no tiles here for {query.dtype}, heads of {head_dim} and a softcap of {how.softcap}")
        sinks = _checked_sinks(how.sinks, num_heads)
        pointers = tables.pointers()
        self._functions.attend(
            is_bf16,
            step.buffer_info()[0],
            how.scale,
            how.softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
            pointers.buffer_info()[0],
            torch.get_num_threads(),
        )
        return out

    def multiplies(self, num_inputs: int = TILE_INPUTS) -> bool:
        """Whether this processor multiplies bf16 by tiles, and so many inputs fill them."""
        return self._has_tiles and num_inputs % TILE_INPUTS == 0

    def pack(self, weights: Tensor, bias: Tensor | None) -> PackedWeights:
        """`[N, K]` and `[N]`, for products by tiles."""
        _check(weights.dim() == 2, "weights [N, K]", weights)
        num_outputs, num_inputs = weights.shape
        if bias is not None:
            _check(bias.shape == (num_outputs,), "weights [N, K] and bias [N]", weights, bias)
            _is_bf16(weights, bias)
        if not self.multiplies(num_inputs) or weights.dtype != torch.bfloat16:
            raise ValueError(f"no tiles here for {weights.dtype} and {num_inputs} inputs")
        weights = weights.contiguous()
        numbers = torch.empty((-(-num_outputs // PANEL_OUTPUTS) * PANEL_OUTPUTS, num_inputs), dtype=torch.bfloat16)
        self._functions.pack(weights.data_ptr(), numbers.data_ptr(), num_outputs, num_inputs)
        return PackedWeights(numbers, None if bias is None else bias.contiguous(), num_outputs, num_inputs)

    def product(
        self, inputs: Tensor, weights: PackedWeights, after: After = After.NOTHING, other: Tensor | None = None
    ) -> Tensor:
        """`[T, K]` times weights `[N, K]` -> `[T, N]`, plus `other` of that shape if it is to be added.

        Gated: `[T, N / 2]`, of each 32 outputs the first 16 through SiLU, times the others.
        """
        _check(inputs.dim() == 2, "inputs [T, K]", inputs)
        if (other is not None) != (after == After.ADD):
            raise ValueError(f"wanted another tensor to add it, got {after.name} and {type(other).__name__}")
        if after == After.GATE and weights.num_outputs % PANEL_OUTPUTS:
            raise ValueError(f"wanted gates in panels of {PANEL_OUTPUTS} outputs, got {weights.num_outputs}")
        inputs = inputs.contiguous()
        num_outputs = weights.num_outputs // 2 if after == After.GATE else weights.num_outputs
        shape = (len(inputs), num_outputs)
        if inputs.shape[1] != weights.num_inputs or (other is not None and other.shape != shape):
            raise ValueError(f"wanted inputs {(len(inputs), weights.num_inputs)} and other {shape}")
        outputs = torch.empty(shape, dtype=torch.bfloat16)
        if other is not None:
            other = other.contiguous()
        if not _is_bf16(inputs, *(() if other is None else (other,))):
            raise TypeError(f"tiles multiply bf16, got {inputs.dtype}")
        self._functions.product(
            after,
            inputs.data_ptr(),
            *weights.pointers(),
            None if other is None else other.data_ptr(),
            outputs.data_ptr(),
            *(len(inputs), weights.num_outputs, weights.num_inputs),
            torch.get_num_threads(),
        )
        return outputs

    def decode_(
        self,
        decoder: array,
        layers: array,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        tables: Tables,
        *,
        scale: float,
        epsilon: float,
    ) -> None:
        """All layers of a decoder by tiles, in place: hidden `[T, E]` in bf16, cos and sin `[T, D]`.

        `decoder` and `layers` are the C++ structs of these names.
        """
        if not _is_bf16(hidden, cos, sin) or not all(tensor.is_contiguous() for tensor in (hidden, cos, sin)):
            raise ValueError("wanted dense bf16 tensors")
        if len(decoder) != DECODER_FIELDS or len(layers) != decoder[0] * LAYER_FIELDS:
            raise ValueError(f"wanted {DECODER_FIELDS} counts of a decoder and {LAYER_FIELDS} addresses for each layer")
        angles = (len(hidden), decoder[-1])
        is_right = hidden.dim() == 2 and hidden.shape[1] == decoder[1] and cos.shape == sin.shape == angles
        _check(is_right, "hidden [T, E], cos and sin [T, D] of this decoder", hidden, cos, sin)
        if not self.multiplies():
            raise ValueError("no tiles here")
        tables.check()
        pointers = tables.pointers()
        self._functions.decode(
            *(table.buffer_info()[0] for table in (decoder, layers, pointers)),
            *(tensor.data_ptr() for tensor in (hidden, cos, sin)),
            len(hidden),
            scale,
            epsilon,
            torch.get_num_threads(),
        )


def _check(is_right: object, wanted: str, *tensors: Tensor) -> None:
    """Raises ValueError with the shapes that were wanted."""
    if not is_right:
        raise ValueError(f"wanted {wanted}, got {[tuple(tensor.shape) for tensor in tensors]}")


def _three(tensor: Tensor) -> tuple[int, int, int]:
    """The shape of a tensor of three dimensions. Raises ValueError for another one."""
    _check(tensor.dim() == 3, "three dimensions", tensor)
    first, second, third = tensor.shape
    return first, second, third


def _checked_sinks(sinks: Tensor | None, num_heads: int) -> Tensor | None:
    """Raises ValueError unless there is one fp32 number for each query head."""
    if sinks is None:
        return None
    if sinks.dtype != torch.float32 or sinks.shape != (num_heads,):
        raise ValueError(f"wanted {num_heads} sinks in fp32, got {tuple(sinks.shape)} in {sinks.dtype}")
    return sinks.contiguous()


def _is_bf16(*tensors: Tensor) -> bool:
    """Raises TypeError unless all are of one type that the kernels read, ValueError unless each row is dense."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES or any(tensor.dtype != dtype for tensor in tensors):
        raise TypeError(f"wanted tensors all fp32 or all bf16, got {[tensor.dtype for tensor in tensors]}")
    if any(not tensor.is_cpu for tensor in tensors):
        raise ValueError(f"wanted tensors in this machine's memory, got {[tensor.device for tensor in tensors]}")
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError(f"wanted a dense last dimension, got strides {[tensor.stride() for tensor in tensors]}")
    return dtype == torch.bfloat16
