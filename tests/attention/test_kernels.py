"""The compiled kernels against torch's own operations: norms, rotary positions, logits and attention by vectors."""

from array import array

import pytest
import torch
from random_tensors import randn
from torch.nn import functional

from segue.attention.backend import LayerAttention
from segue.attention.cpu.flash import flash
from segue.attention.cpu.kernels import ALL_SEEN, Tables

SCALE = 0.3
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of numbers of about one
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16"])


@dtypes
@pytest.mark.parametrize("width", [1, 48, 576, 1000])
def test_rms_norm_is_torchs(kernels, width, dtype):
    hidden, weight = 3 * randn(7, width, dtype=dtype), randn(width, dtype=dtype)
    wanted = functional.rms_norm(hidden.double(), (width,), weight.double(), 1e-5).to(dtype)
    torch.testing.assert_close(kernels.rms_norm(hidden, weight, 1e-5), wanted)


@dtypes
@pytest.mark.parametrize("head_dim", [2, 16, 64, 96])
def test_rotation_of_some_heads_leaves_the_others(kernels, head_dim, dtype):
    heads, angles = randn(9, 5, head_dim, dtype=dtype), randn(9, head_dim // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    wanted = heads.double()
    low, high = wanted[:, :3].chunk(2, dim=-1)
    wanted[:, :3] = wanted[:, :3] * cos[:, None].double() + torch.cat([-high, low], -1) * sin[:, None].double()
    kernels.rotate_(heads[:, :3], cos, sin)
    torch.testing.assert_close(heads, wanted.to(dtype))


def test_bf16_is_rounded_as_torch_does_it_ties_to_even(kernels):
    heads, cos = randn(200, 5, 64, dtype=torch.bfloat16), randn(200, 32, dtype=torch.bfloat16).repeat(1, 2)
    product = heads.float() * cos.float()[:, None]  # exact
    assert ((product.view(torch.int32) & 0xFFFF) == 0x8000).sum() > 100, "no ties"
    kernels.rotate_(heads, cos, torch.zeros_like(cos))
    assert torch.equal(heads, product.bfloat16())


@pytest.mark.parametrize("spread", [1.0, 3.0, 6.0])
def test_totals_of_a_large_vocabulary_have_no_error_of_one_sign(kernels, spread):
    """What is small beside the sum so far counts, too: scores of long texts add up such errors."""
    logits = spread * randn(100, 49_152)
    highest, _, totals = kernels.summarise(logits, with_totals=True)
    error = totals.double() + highest.double() - logits.double().logsumexp(-1)
    assert error.mean().abs() < 1e-7


@dtypes
@pytest.mark.parametrize("width", [1, 15, 49, 5000])
def test_summary_of_logits_is_torchs(kernels, width, dtype):
    logits = (3 * randn(40, width, dtype=dtype)).round()  # with ties
    logits[3], logits[4, width // 2], logits[5, width // 2] = 7.0, torch.inf, -torch.inf
    highest, most_likely, totals = kernels.summarise(logits, with_totals=True)
    assert torch.equal(highest, logits.float().amax(-1))
    assert torch.equal(most_likely, logits.argmax(-1))
    sound = highest.isfinite()
    wanted = (logits.double().logsumexp(-1) - highest.double()).float()
    torch.testing.assert_close(totals[sound], wanted[sound], atol=1e-6, rtol=1e-6)
    assert not totals[~sound].isfinite().any()
    logits[::2, -1], logits[1::2, 0] = torch.nan, torch.nan
    assert kernels.summarise(logits, with_totals=False)[0].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "head_dim", "by_tiles"),
    [
        *((dtype, head_dim, False) for dtype in TOLERANCES for head_dim in (8, 64, 80, 128)),
        *((torch.bfloat16, head_dim, True) for head_dim in (32, 64, 128)),
    ],
)
@pytest.mark.parametrize("groups", [1, 3, 4])
def test_keys_in_memory_of_the_step_and_in_parts_are_one_softmax(kernels, groups, dtype, head_dim, by_tiles):
    """40 causal queries and one more, over 100 keys in memory, 70 that flash attention has seen, and their own."""
    if by_tiles and not kernels.multiplies(head_dim):
        pytest.skip("this processor multiplies no tiles")
    num_key_heads, num_tokens, layer = 2, 41, 1
    num_heads = num_key_heads * groups
    query = randn(num_tokens, num_heads, head_dim, dtype=dtype).transpose(0, 1)
    key, value = (
        randn(num_tokens, 3 + more, head_dim, dtype=dtype)[:, :num_key_heads].transpose(0, 1) for more in (0, 1)
    )
    memory = randn(2, 2, num_key_heads, 100, head_dim, dtype=dtype)
    above = randn(2, num_key_heads, 70, head_dim, dtype=dtype)
    part, lse = flash(query[None], *above[:, None], scale=SCALE)
    grouped = [tensor[0].unflatten(0, (num_key_heads, groups)) for tensor in (part, lse)]  # [Hkv, G, T(, D)]
    strides = [tensor.stride(axis) for tensor in grouped for axis in (0, 2, 1)]
    stays = torch.zeros(2, 2, num_key_heads, 50, head_dim, dtype=dtype)
    tables = Tables(
        by_tiles=by_tiles,
        blocks=array(
            "q", (0, 40, above.data_ptr(), 0, *above.stride()[:3], 0, 70, False, ALL_SEEN) if by_tiles else ()
        ),
        kept=array("q", (stays[:, :, :, 7:].data_ptr(), *stays.stride()[:4], 1, 41)),
        runs=array("q", (0, 40, 1, 3, 0, 1, 40, 41, 0, 2, 1, 1)),
        spans=array(
            "q",
            (
                *(0, 0, 0, 0, 0, 40, 1, False, ALL_SEEN),
                *(memory.data_ptr(), *memory.stride()[:4], 0, 100, False, ALL_SEEN),
                *(0, 0, 0, 0, 0, 0, 40, True, ALL_SEEN),
            ),
        ),
        parts=array("q", (0, part.data_ptr(), lse.data_ptr(), *strides)),
        indices=array("q", (0,)),
    )
    got = kernels.attend(layer, query, key, value, LayerAttention(SCALE), tables)
    assert got.dtype == dtype
    assert torch.equal(stays[layer, :, :, 7:47], torch.stack([key[:, 1:], value[:, 1:]]))
    assert not stays[:, :, :, [*range(7), 47, 48, 49]].any()
    assert not stays[1 - layer].any()
    for token in (0, 1, 17, 39, 40):
        own = slice(token, 41) if token == 40 else slice(0, token + 1)
        seen = [[memory[layer, which], both[:, own]] for which, both in ((0, key), (1, value))]
        if token < 40:
            seen = [[*parts, above[which]] for which, parts in enumerate(seen)]
        keys, values = (torch.cat(parts, dim=1).double().repeat_interleave(groups, dim=0) for parts in seen)
        scores = torch.einsum("hd,hkd->hk", query[:, token].double(), keys) * SCALE
        wanted = torch.einsum("hk,hkd->hd", scores.softmax(-1), values)
        torch.testing.assert_close(got[token].double(), wanted, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_kept(kernels, bad):
    """A row whose numbers overflow is told as a row error, so nothing may hide it."""
    query, key = randn(1, 1, 8), randn(1, 1, 8)
    spans = array("q", (0, 0, 0, 0, 0, 0, 1, False, ALL_SEEN))
    tables = Tables(runs=array("q", (0, 1, 0, 1, 0, 0)), spans=spans)
    assert (
        kernels.attend(0, query, key, torch.full((1, 1, 8), bad), LayerAttention(1.0), tables)
        .isfinite()
        .logical_not()
        .all()
    )
    assert kernels.attend(0, torch.full((1, 1, 8), bad), key, key, LayerAttention(1.0), tables).isnan().all()
    assert not kernels.rms_norm(torch.full((1, 8), bad), randn(8), 1e-5).isfinite().any()


def test_large_and_small_scores_do_not_overflow(kernels):
    keys = torch.tensor([1000.0, -1000.0, 999.0]).reshape(1, 3, 1)
    spans = array("q", (0, 0, 0, 0, 0, 0, 3, False, ALL_SEEN))
    tables = Tables(runs=array("q", (0, 3, 0, 1, 0, 0)), spans=spans)
    got = kernels.attend(
        0, torch.ones(1, 3, 1), keys, torch.tensor([1.0, 5.0, 2.0]).reshape(1, 3, 1), LayerAttention(1.0), tables
    )
    torch.testing.assert_close(got[:, 0, 0], torch.full((3,), float(torch.tensor([1000.0, 999.0]).softmax(0)[1]) + 1))


def test_rows_that_are_not_dense_are_refused_rather_than_misread(kernels):
    sparse = randn(3, 8, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="dense last dimension"):
        kernels.attend(0, sparse, randn(3, 2, 8), randn(3, 2, 8), LayerAttention(1.0), Tables())


def test_tensors_of_mixed_types_are_refused_rather_than_misread(kernels):
    hidden, other = randn(3, 1, 48), randn(3, 48, dtype=torch.bfloat16)
    for call in (
        lambda: kernels.rms_norm(hidden, other[0], 1e-5),
        lambda: kernels.rotate_(hidden, other, other),
        lambda: kernels.attend(0, hidden, hidden, hidden.bfloat16(), LayerAttention(1.0), Tables()),
        lambda: kernels.rms_norm(hidden.double(), hidden.double()[0, 0], 1e-5),
    ):
        with pytest.raises(TypeError, match="fp32 or all bf16"):
            call()
