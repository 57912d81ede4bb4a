"""What processors with AMX multiply by tiles, in bf16, against torch in fp64."""

from array import array
from functools import partial

import pytest
import torch
from random_tensors import randn
from torch.nn import functional

from segue.attention.backend import LayerAttention
from segue.attention.cpu.kernels import ALL_SEEN, After, Tables


@pytest.mark.parametrize("num_tokens", [1, 15, 17, 33, 64, 700])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(32, 32), (192, 96), (1600, 64), (96, 1536)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_by_tiles_are_torchs(tiles, num_tokens, num_outputs, num_inputs, has_bias):
    """Sums in fp32, rounded once: to within one unit of bf16 of what fp64 says."""
    inputs = randn(num_tokens, num_inputs, dtype=torch.bfloat16)
    weights = (randn(num_outputs, num_inputs) / num_inputs**0.5).bfloat16()
    bias = randn(num_outputs, dtype=torch.bfloat16) if has_bias else None
    packed = tiles.pack(weights, bias)
    wanted = functional.linear(inputs.double(), weights.double(), None if bias is None else bias.double())
    close = partial(torch.testing.assert_close, atol=1e-2, rtol=8e-3)
    close(tiles.product(inputs, packed).double(), wanted)
    other = randn(num_tokens, num_outputs, dtype=torch.bfloat16)
    close(tiles.product(inputs, packed, After.ADD, other).double(), wanted + other)
    gate, up = wanted.unflatten(1, (-1, 2, 16)).unbind(2)
    close(tiles.product(inputs, packed, After.GATE).double(), (functional.silu(gate) * up).flatten(1))


@pytest.mark.parametrize("num_outputs", [1, 16, 17, 49])
def test_outputs_that_fill_no_panel(tiles, num_outputs):
    inputs, weights = randn(40, 64, dtype=torch.bfloat16), randn(num_outputs, 64, dtype=torch.bfloat16)
    bias, other = randn(num_outputs, dtype=torch.bfloat16), randn(40, num_outputs, dtype=torch.bfloat16)
    got = tiles.product(inputs, tiles.pack(weights, bias), After.ADD, other)
    wanted = functional.linear(inputs.double(), weights.double(), bias.double()) + other
    torch.testing.assert_close(got.double(), wanted, atol=5e-2, rtol=8e-3)


def test_gates_far_from_zero_are_open_or_closed(tiles):
    inputs, weights = torch.eye(32, dtype=torch.bfloat16), torch.zeros(32, 32, dtype=torch.bfloat16)
    gates = torch.tensor([-1e30, -200.0, -90.0, -1.0, 0.0, 1.0, 90.0, 200.0, 1e30]).bfloat16()
    weights[0, : len(gates)], weights[16] = gates, 1.0
    inputs[9] = torch.nan
    got = tiles.product(inputs, tiles.pack(weights, None), After.GATE)[:, 0]
    torch.testing.assert_close(got[:9].float(), functional.silu(gates.float()), atol=1e-30, rtol=8e-3)
    assert got[9].isnan()


def test_what_tiles_cannot_multiply_is_refused(tiles):
    inputs, weights = randn(3, 64, dtype=torch.bfloat16), randn(32, 64, dtype=torch.bfloat16)
    packed = tiles.pack(weights, None)
    for wrong in (
        lambda: tiles.pack(weights.float(), None),
        lambda: tiles.pack(weights[:, :48], None),
        lambda: tiles.product(inputs[:, :32], packed),
        lambda: tiles.product(inputs, packed, After.ADD, inputs),
        lambda: tiles.attend(0, *[randn(1, 3, 64)] * 3, LayerAttention(1.0), Tables(by_tiles=True)),
        lambda: tiles.attend(
            0, *[randn(1, 3, 16, dtype=torch.bfloat16)] * 3, LayerAttention(1.0), Tables(by_tiles=True)
        ),
    ):
        with pytest.raises(ValueError, match=r"no tiles here|wanted inputs"):
            wrong()
    with pytest.raises(TypeError, match="bf16"):
        tiles.product(inputs.float(), packed)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_scores_by_tiles_do_not_overflow(tiles, scale):
    """Some so far from the highest that their weights are 0; over more keys than are multiplied at once."""
    query = torch.ones(3, 1, 32, dtype=torch.bfloat16)
    key, value = (scale * randn(1, 1, 700, 32)).bfloat16(), randn(1, 1, 700, 32, dtype=torch.bfloat16)
    memory = torch.stack([key, value], dim=1)
    span = (memory.data_ptr(), *memory.stride()[:4], 0, 700, False, ALL_SEEN)
    wanted = functional.scaled_dot_product_attention(
        query.double(), key[0].double().expand(3, -1, -1), value[0].double().expand(3, -1, -1), scale=1.0
    )
    own = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
    run = Tables(by_tiles=True, runs=array("q", (0, 1, 0, 1, 0, 0)), spans=array("q", span))
    part = Tables(
        by_tiles=True,
        runs=array("q", (0, 1, 0, 0, 0, 1)),
        indices=array("q", (0,)),
        blocks=array("q", (0, 1, *span)),
    )
    for tables in (run, part):
        got = tiles.attend(0, query, own, own, LayerAttention(1.0), tables)
        torch.testing.assert_close(got[0].double(), wanted[:, 0], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_stay_in_their_row(tiles, bad):
    """Two runs over one block; what overflows in the first is multiplied beside the second, and lies in a thread's
    memory right behind where the second has its last key."""
    query, key, value = (randn(1, 40, 32, dtype=torch.bfloat16) for _ in range(3))
    shared = randn(1, 2, 1, 50, 32, dtype=torch.bfloat16)
    spans = [(0, 0, 0, 0, 0, 0, 21, False, ALL_SEEN), (0, 0, 0, 0, 0, 21, 19, False, ALL_SEEN)]
    block = (0, 40, shared.data_ptr(), *shared.stride()[:4], 0, 50, False, ALL_SEEN)
    tables = Tables(
        by_tiles=True,
        runs=array("q", (0, 21, 0, 1, 0, 1, 21, 40, 1, 2, 1, 2)),
        spans=array("q", (*spans[0], *spans[1])),
        indices=array("q", (0, 0)),
        blocks=array("q", block),
    )
    sound = tiles.attend(0, query, key, value, LayerAttention(0.3), tables)
    query[0, 5], value[0, 19] = bad, bad
    got = tiles.attend(0, query, key, value, LayerAttention(0.3), tables)
    assert torch.equal(got[21:], sound[21:])
    assert not got[:21].isfinite().all(dim=-1).any()
