"""The compiled kernels against torch's own operations, and what becomes of a machine that cannot build them."""

import logging
import os
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from segue.attention.cpu.backend import NativeBackend
from segue.attention.cpu.flash import flash
from segue.attention.cpu.kernels import After, Kernels, Tables, load_kernels
from segue.attention.memory.budget import KVShape
from segue.workers.devices.devices import cpu_kernels, make_backend
from segue.workers.errors import ModelRefused

CPU = torch.device("cpu")
SCALE = 0.3
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of numbers of about one
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16"])


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def kernels(request) -> Iterator[Kernels]:
    found = cpu_kernels()
    if found is None:
        pytest.skip("no C++ compiler on this machine")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield found
    torch.set_num_threads(before)


def randn(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


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


@dtypes
@pytest.mark.parametrize("width", [1, 15, 49, 5000])
def test_summary_of_logits_is_torchs(kernels, width, dtype):
    logits = (3 * randn(40, width, dtype=dtype)).round()  # with ties
    logits[3], logits[4, width // 2], logits[5, width // 2] = 7.0, torch.inf, -torch.inf
    highest, most_likely, totals = kernels.summarise(logits, with_totals=True)
    assert torch.equal(highest, logits.float().amax(-1))
    assert torch.equal(most_likely, logits.argmax(-1))
    sound = highest.isfinite()
    wanted = logits.double().logsumexp(-1).float()
    torch.testing.assert_close(totals[sound], wanted[sound], atol=1e-5, rtol=1e-6)
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
    if by_tiles and not kernels.has_tiles:
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
        blocks=array("q", (0, 40, above.data_ptr(), 0, *above.stride()[:3], 0, 70, False) if by_tiles else ()),
        kept=array("q", (stays[:, :, :, 7:].data_ptr(), *stays.stride()[:4], 1, 41)),
        runs=array("q", (0, 40, 1, 3, 0, 1, 40, 41, 0, 2, 1, 1)),
        spans=array(
            "q",
            (
                *(0, 0, 0, 0, 0, 40, 1, False),
                *(memory.data_ptr(), *memory.stride()[:4], 0, 100, False),
                *(0, 0, 0, 0, 0, 0, 40, True),
            ),
        ),
        parts=array("q", (0, part.data_ptr(), lse.data_ptr(), *strides)),
        indices=array("q", (0,)),
    )
    got = kernels.attend(layer, query, key, value, SCALE, tables)
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


@pytest.fixture
def tiles(kernels) -> Kernels:
    if not kernels.has_tiles:
        pytest.skip("this processor multiplies no tiles")
    return kernels


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
        lambda: tiles.attend(0, *[randn(1, 3, 64)] * 3, 1.0, Tables(by_tiles=True)),
        lambda: tiles.attend(0, *[randn(1, 3, 16, dtype=torch.bfloat16)] * 3, 1.0, Tables(by_tiles=True)),
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
    span = (memory.data_ptr(), *memory.stride()[:4], 0, 700, False)
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
        got = tiles.attend(0, query, own, own, 1.0, tables)
        torch.testing.assert_close(got[0].double(), wanted[:, 0], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_stay_in_their_row(tiles, bad):
    """Two runs over one block; what overflows in the first is multiplied beside the second, and lies in a thread's
    memory right behind where the second has its last key."""
    query, key, value = (randn(1, 40, 32, dtype=torch.bfloat16) for _ in range(3))
    shared = randn(1, 2, 1, 50, 32, dtype=torch.bfloat16)
    spans = [(0, 0, 0, 0, 0, 0, 21, False), (0, 0, 0, 0, 0, 21, 19, False)]
    block = (0, 40, shared.data_ptr(), *shared.stride()[:4], 0, 50, False)
    tables = Tables(
        by_tiles=True,
        runs=array("q", (0, 21, 0, 1, 0, 1, 21, 40, 1, 2, 1, 2)),
        spans=array("q", (*spans[0], *spans[1])),
        indices=array("q", (0, 0)),
        blocks=array("q", block),
    )
    sound = tiles.attend(0, query, key, value, 0.3, tables)
    query[0, 5], value[0, 19] = bad, bad
    got = tiles.attend(0, query, key, value, 0.3, tables)
    assert torch.equal(got[21:], sound[21:])
    assert not got[:21].isfinite().all(dim=-1).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_kept(kernels, bad):
    """A row whose numbers overflow is told as a row error, so nothing may hide it."""
    query, key = randn(1, 1, 8), randn(1, 1, 8)
    spans = array("q", (0, 0, 0, 0, 0, 0, 1, False))
    tables = Tables(runs=array("q", (0, 1, 0, 1, 0, 0)), spans=spans)
    assert kernels.attend(0, query, key, torch.full((1, 1, 8), bad), 1.0, tables).isfinite().logical_not().all()
    assert kernels.attend(0, torch.full((1, 1, 8), bad), key, key, 1.0, tables).isnan().all()
    assert not kernels.rms_norm(torch.full((1, 8), bad), randn(8), 1e-5).isfinite().any()


def test_large_and_small_scores_do_not_overflow(kernels):
    keys = torch.tensor([1000.0, -1000.0, 999.0]).reshape(1, 3, 1)
    spans = array("q", (0, 0, 0, 0, 0, 0, 3, False))
    tables = Tables(runs=array("q", (0, 3, 0, 1, 0, 0)), spans=spans)
    got = kernels.attend(0, torch.ones(1, 3, 1), keys, torch.tensor([1.0, 5.0, 2.0]).reshape(1, 3, 1), 1.0, tables)
    torch.testing.assert_close(got[:, 0, 0], torch.full((3,), float(torch.tensor([1000.0, 999.0]).softmax(0)[1]) + 1))


# -- machines


@pytest.fixture
def fresh(monkeypatch):
    """Nothing has been loaded yet."""
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()


def test_library_is_built_once_and_is_its_owners_alone(tmp_path, fresh, monkeypatch):
    if load_kernels(tmp_path / "kernels") is None:
        pytest.skip("no C++ compiler on this machine")
    (library,) = (tmp_path / "kernels").iterdir()  # no leftovers
    built = library.stat().st_mtime_ns
    assert (tmp_path / "kernels").stat().st_mode & 0o077 == 0
    load_kernels.cache_clear()
    assert load_kernels(tmp_path / "kernels") is not None
    assert library.stat().st_mtime_ns == built
    stranger = tmp_path / "stranger"  # written beside: the library is mapped into this process
    stranger.write_bytes(b"anything")
    os.chmod(stranger, 0o777)
    os.replace(stranger, library)
    load_kernels.cache_clear()
    assert load_kernels(tmp_path / "kernels") is not None
    assert library.stat().st_mtime_ns != built
    assert library.stat().st_mode & 0o022 == 0


def test_folder_that_others_may_write_to_is_not_used(tmp_path, fresh, caplog):
    if cpu_kernels() is None:
        pytest.skip("no C++ compiler on this machine")
    load_kernels.cache_clear()
    (tmp_path / "kernels").mkdir()
    os.chmod(tmp_path / "kernels", 0o777)
    with caplog.at_level(logging.WARNING):
        assert load_kernels(tmp_path / "kernels") is None
    assert "others may write to" in caplog.text
    assert not list((tmp_path / "kernels").iterdir())


def test_torn_library_is_built_anew_by_the_next_process(tmp_path, fresh, caplog):
    if load_kernels(tmp_path / "other") is None:
        pytest.skip("no C++ compiler on this machine")
    (library,) = (tmp_path / "other").iterdir()
    (tmp_path / "kernels").mkdir(mode=0o700)
    (tmp_path / "kernels" / library.name).touch(mode=0o755)
    load_kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert load_kernels(tmp_path / "kernels") is None
    assert "cannot be used" in caplog.text
    load_kernels.cache_clear()
    assert load_kernels(tmp_path / "kernels") is not None


def test_rows_that_are_not_dense_are_refused_rather_than_misread(kernels):
    sparse = randn(3, 8, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="dense last dimension"):
        kernels.attend(0, sparse, randn(3, 2, 8), randn(3, 2, 8), 1.0, Tables())


@pytest.mark.parametrize(
    ("compiler", "told"),
    [("/nowhere/g++", "nowhere"), ("false", "false"), ("broken", "an error of the compiler")],
)
def test_machine_without_a_working_compiler_uses_torchs_operations_and_says_so(
    tmp_path, fresh, monkeypatch, caplog, compiler, told
):
    if compiler == "broken":
        compiler = str(tmp_path / "compiler")
        script = '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho an error of the compiler >&2; exit 1\n'
        Path(compiler).write_text(script)
        os.chmod(compiler, 0o755)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("SEGUE_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert cpu_kernels() is None
        assert cpu_kernels() is None
    assert len(caplog.records) == 1
    assert told in caplog.text
    assert _backend_names()["auto"] == "TorchBackend"
    with pytest.raises(ModelRefused, match=r"native wants a C\+\+ compiler"):
        make_backend("native", _shape(), [CPU])


def test_no_compiler_at_all(tmp_path, fresh, monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert load_kernels(tmp_path) is None
    assert "no C++ compiler found" in caplog.text


def test_library_that_lacks_a_function_is_not_used(tmp_path, fresh, monkeypatch, caplog):
    (tmp_path / "cpp").mkdir()
    (tmp_path / "cpp" / "other.cpp").write_text('extern "C" void segue_rms_norm() {}\n')
    monkeypatch.setattr("segue.attention.cpu.kernels.SOURCES", tmp_path / "cpp")
    with caplog.at_level(logging.WARNING):
        assert load_kernels(tmp_path / "kernels") is None
    assert "segue_rotate" in caplog.text or "no C++ compiler" in caplog.text


def test_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("SEGUE_CPU_KERNELS", "0")
    assert cpu_kernels() is None
    assert _backend_names()["auto"] == "TorchBackend"


def test_auto_is_the_kernels_where_they_can_be_had():
    if cpu_kernels() is None:
        pytest.skip("no C++ compiler on this machine")
    assert _backend_names() == {"auto": "NativeBackend", "cpu": "TorchBackend", "native": "NativeBackend"}
    assert isinstance(make_backend("auto", _shape(torch.bfloat16), [CPU]), NativeBackend)
    assert not isinstance(make_backend("auto", _shape(torch.float16), [CPU]), NativeBackend)


def test_tensors_of_mixed_types_are_refused_rather_than_misread(kernels):
    hidden, other = randn(3, 1, 48), randn(3, 48, dtype=torch.bfloat16)
    for call in (
        lambda: kernels.rms_norm(hidden, other[0], 1e-5),
        lambda: kernels.rotate_(hidden, other, other),
        lambda: kernels.attend(0, hidden, hidden, hidden.bfloat16(), 1.0, Tables()),
        lambda: kernels.rms_norm(hidden.double(), hidden.double()[0, 0], 1e-5),
    ):
        with pytest.raises(TypeError, match="fp32 or all bf16"):
            call()


def _shape(dtype: torch.dtype = torch.float32) -> KVShape:
    return KVShape(1, 2, 8, dtype)


def _backend_names() -> dict[str, str]:
    names = ("auto", "cpu", "native") if cpu_kernels() is not None else ("auto", "cpu")
    return {name: type(make_backend(name, _shape(), [CPU])).__name__ for name in names}
