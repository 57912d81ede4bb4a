"""Shapes that do not go together are refused where they enter C++, which reads and writes by address."""

from array import array

import pytest
import torch
from random_tensors import randn
from tree_backends import BACKENDS, NAMES
from tree_harness import PLAIN, Harness

from segue.attention.backend import LayerAttention
from segue.attention.cpu.kernels import DECODER_FIELDS, LAYER_FIELDS, After, PackedWeights, Tables
from segue.attention.segments import Segment
from segue.attention.tree.blocks import blocks_of

HOW = LayerAttention(1.0)
BF16 = torch.bfloat16
PACKED = PackedWeights(torch.zeros(32, 64, dtype=BF16), None, 32, 64)
UNEVEN = PackedWeights(torch.zeros(64, 64, dtype=BF16), None, 48, 64)


def rotated(heads, cos, sin=None):
    return lambda kernels: kernels.rotate_(heads, cos, cos if sin is None else sin)


def attended(query, key, value, tables=None, layer=0):
    return lambda kernels: kernels.attend(layer, query, key, value, HOW, tables or Tables())


def multiplied(inputs, weights=PACKED, after=After.NOTHING, other=None):
    return lambda kernels: kernels.product(inputs, weights, after, other)


def decoded(hidden, cos, sin, num_fields=DECODER_FIELDS, num_addresses=2 * LAYER_FIELDS):
    decoder = array("q", (2, 64, 96, 1, 2, 32, 0, 0)[:num_fields])
    layers = array("q", [0] * num_addresses)
    return lambda kernels: kernels.decode_(decoder, layers, hidden, cos, sin, Tables(), scale=1.0, epsilon=1e-5)


def bf16(*shape):
    return randn(*shape, dtype=BF16)


WRONG = {
    "rms_norm: a weight too short": lambda kernels: kernels.rms_norm(randn(3, 48), randn(47), 1e-5),
    "rms_norm: a weight too long": lambda kernels: kernels.rms_norm(randn(3, 48), randn(49), 1e-5),
    "rms_norm: a weight for each row": lambda kernels: kernels.rms_norm(randn(3, 48), randn(3, 48), 1e-5),
    "rms_norm: no numbers": lambda kernels: kernels.rms_norm(randn(3, 0), randn(0), 1e-5),
    "rms_norm: no dimension": lambda kernels: kernels.rms_norm(torch.tensor(1.0), randn(1), 1e-5),
    "rotate_: two dimensions": rotated(randn(3, 16), randn(3, 16)),
    "rotate_: angles of too few tokens": rotated(randn(3, 2, 16), randn(2, 16)),
    "rotate_: angles of a part of each head": rotated(randn(3, 2, 16), randn(3, 8)),
    "rotate_: sines of too few tokens": rotated(randn(3, 2, 16), randn(3, 16), randn(1, 16)),
    "rotate_: angles that are not dense": rotated(randn(3, 2, 16), randn(3, 32)[:, :16]),
    "rotate_: an odd width": rotated(randn(3, 2, 15), randn(3, 15)),
    "rotate_: heads apart": rotated(randn(3, 2, 32)[:, :, :16], randn(3, 16)),
    "summarise: one dimension": lambda kernels: kernels.summarise(randn(40), with_totals=True),
    "summarise: no vocabulary": lambda kernels: kernels.summarise(randn(3, 0), with_totals=True),
    "attend: two dimensions": attended(randn(3, 8), randn(3, 8), randn(3, 8)),
    "attend: keys of too few tokens": attended(randn(4, 3, 8), randn(2, 2, 8), randn(2, 2, 8)),
    "attend: keys of another width": attended(randn(4, 3, 8), randn(2, 3, 4), randn(2, 3, 4)),
    "attend: fewer values than keys": attended(randn(4, 3, 8), randn(2, 3, 8), randn(1, 3, 8)),
    "attend: values narrower than keys": attended(randn(4, 3, 8), randn(2, 3, 8), randn(2, 3, 4)),
    "attend: heads that no groups fill": attended(randn(5, 3, 8), randn(2, 3, 8), randn(2, 3, 8)),
    "attend: fewer queries than keys": attended(randn(1, 3, 8), randn(2, 3, 8), randn(2, 3, 8)),
    "attend: no keys": attended(randn(4, 3, 8), randn(0, 3, 8), randn(0, 3, 8)),
    "attend: a layer below 0": attended(randn(4, 3, 8), randn(2, 3, 8), randn(2, 3, 8), layer=-1),
    "attend: half a run": attended(randn(2, 3, 8), randn(2, 3, 8), randn(2, 3, 8), Tables(runs=array("q", (0, 1)))),
    "attend: half a span": attended(randn(2, 3, 8), randn(2, 3, 8), randn(2, 3, 8), Tables(spans=array("q", (0,)))),
    "pack: one dimension": lambda kernels: kernels.pack(bf16(64), None),
    "pack: a bias too short": lambda kernels: kernels.pack(bf16(32, 64), bf16(31)),
    "product: one dimension": multiplied(bf16(64)),
    "product: inputs of another width": multiplied(bf16(3, 32)),
    "product: nothing to add": multiplied(bf16(3, 64), after=After.ADD),
    "product: what is added has too few rows": multiplied(bf16(3, 64), after=After.ADD, other=bf16(2, 32)),
    "product: something that is not added": multiplied(bf16(3, 64), other=bf16(3, 32)),
    "product: gates that fill no panel": multiplied(bf16(3, 64), UNEVEN, After.GATE),
    "decode_: hidden states of another width": decoded(bf16(3, 32), bf16(3, 32), bf16(3, 32)),
    "decode_: angles of too few tokens": decoded(bf16(3, 64), bf16(2, 32), bf16(3, 32)),
    "decode_: sines of another width": decoded(bf16(3, 64), bf16(3, 32), bf16(3, 16)),
    "decode_: half a decoder": decoded(bf16(3, 64), bf16(3, 32), bf16(3, 32), num_fields=5),
    "decode_: a layer missing": decoded(bf16(3, 64), bf16(3, 32), bf16(3, 32), num_addresses=LAYER_FIELDS),
    "decode_: one dimension": decoded(bf16(64), bf16(64, 32), bf16(64, 32)),
}


@pytest.mark.parametrize("name", WRONG)
def test_shapes_that_do_not_go_together_are_refused_by_each_kernel(kernels, name):
    with pytest.raises(ValueError, match=r"wanted|no tiles"):
        WRONG[name](kernels)


CHECKED = {name: backend for name, backend in zip(NAMES, BACKENDS, strict=True) if name != "reference"}
STEPS = {  # heads of queries and keys, tokens and width of the keys, layer: instead of 4, 2, 5, the shape's and 0
    "more keys than the memory has heads": (4, 4, 5, 0, 0),
    "one key for all heads": (4, 1, 5, 0, 0),
    "too few tokens": (4, 2, 4, 0, 0),
    "narrow heads": (4, 2, 5, -4, 0),
    "wide heads": (4, 2, 5, 8, 0),
    "a layer that is not there": (4, 2, 5, 0, 1),
    "heads that no groups fill": (5, 2, 5, 0, 0),
}


@pytest.mark.parametrize("backend", CHECKED.values(), ids=CHECKED)
@pytest.mark.parametrize("name", STEPS)
def test_step_of_other_shapes_than_the_memory_is_refused_by_each_backend(backend, name):
    num_heads, num_keys, num_tokens, wider, layer = STEPS[name]
    harness = Harness(backend, [(Segment((3, 4, 5, 6, 7), True),)], 0)
    dtype, width = harness.shape.dtype, harness.shape.head_dim + wider
    query, key, value = (randn(heads, num_tokens, width, dtype=dtype) for heads in (num_heads, num_keys, num_keys))
    run = backend.begin(blocks_of(list(harness.tree), []), (), harness.cache)
    with pytest.raises(ValueError, match="wanted keys and values"):
        run.attend(layer, query, key, value, PLAIN)
