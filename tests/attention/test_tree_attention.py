"""Every backend against the dense reference, on random trees: the specification's first line."""

import itertools

import pytest
import torch
from chains import chains
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_backends import BACKENDS, NAMES
from tree_harness import HKV, SCALE, D, H, Harness, check_long_nodes, check_tree

from segue.attention.cpu.by_torch import TorchBackend, merge_part_
from segue.attention.cpu.flash import FEW_KEYS, flash
from segue.attention.segments import Segment, canonical_segments
from segue.attention.tree.blocks import blocks_of


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
@given(rows=chains(max_rows=6), cut=st.integers(0, 8), tails=st.lists(st.integers(0, 40), min_size=6, max_size=6))
@settings(deadline=None, max_examples=60)
def test_tree_attention_on_random_trees_equals_dense_reference(backend, rows, cut, tails):
    check_tree(backend, rows, cut, tails)


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_tree_attention_of_long_nodes_deep_trees_and_many_queries_equals_dense_reference(backend, bidirectional):
    check_long_nodes(backend, bidirectional)


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
@pytest.mark.parametrize("mask", ["segment", "causal"])
@pytest.mark.parametrize("length", [FEW_KEYS + 1, 301, 320, 600])
def test_keys_that_fill_no_whole_tile_of_the_kernel_are_padded_without_a_trace(backend, length, mask):
    """Some are more than are multiplied at once, too."""
    ids = itertools.count()
    root, longer = ([*itertools.islice(ids, size)] for size in (length, length + 3))
    rows = [
        canonical_segments([Segment(tuple(root), True), Segment(tuple(own), True)], mask=mask)
        for own in (longer, *([next(ids) for _ in range(5)] for _ in range(40)))
    ]
    harness = Harness(backend, rows, 0)
    harness.check_prefill(harness.prefill(list(harness.tree)))
    tails = [harness.cache.open_tail() for _ in rows]
    fed = [[] for _ in rows]
    harness.check_decode(harness.decode(tails, fed), fed)


def test_blocks_of_node_before_its_parent_is_computed_is_refused():
    harness = Harness(TorchBackend(), _two_segments(), 0)
    with pytest.raises(ValueError, match="before it is computed"):
        blocks_of([harness.ends[0]], [])


def test_blocks_of_shared_node_is_one_block_over_all_rows_below():
    rows = [(Segment((1, 2), True), Segment((i,), False)) for i in range(5)]
    harness = Harness(TorchBackend(), rows, 0)
    blocks = blocks_of(list(harness.tree), [])
    assert [(b.start, b.stop, len(b.node)) for b in blocks.cross_blocks] == [(2, 7, 2)]


def _two_segments():
    return [(Segment((1, 2), True), Segment((3,), False))]


def test_merge_of_parts_is_attention_over_their_union():
    q, k = torch.randn(1, H, 5, D), torch.randn(1, H, 9, D)
    out, lse = torch.zeros(1, H, 5, D), torch.full((1, H, 5), -torch.inf)
    for keys in (k[:, :, :2], k[:, :, 2:8], k[:, :, 8:]):
        merge_part_(out, lse, *flash(q, keys, keys, scale=SCALE))
    torch.testing.assert_close((out, lse), flash(q, k, k, scale=SCALE))


def test_flash_without_keys_is_refused_instead_of_killing_the_process():
    q = torch.randn(1, H, 2, D)
    with pytest.raises(ValueError, match="no keys"):
        flash(q, q[:, :HKV, :0], q[:, :HKV, :0], scale=1.0)


def test_flash_causal_rectangle_is_refused():
    q = torch.randn(1, H, 2, D)
    with pytest.raises(ValueError, match="square"):
        flash(q, torch.randn(1, HKV, 3, D), torch.randn(1, HKV, 3, D), scale=1.0, is_causal=True)


def test_flash_boolean_mask_is_refused():
    q = torch.randn(1, H, 2, D)
    with pytest.raises(ValueError, match="boolean"):
        flash(q, q[:, :HKV], q[:, :HKV], scale=1.0, bias=torch.ones(2, 2, dtype=torch.bool))


def test_flash_log_sum_exp_is_natural_and_matches_dense_scores():
    q, k = torch.randn(1, H, 5, D), torch.randn(1, HKV, 7, D)
    _, lse = flash(q, k, k, scale=SCALE)
    scores = q[0] @ k[0].repeat_interleave(2, dim=0).transpose(-1, -2) * SCALE
    torch.testing.assert_close(lse[0], scores.logsumexp(-1), atol=1e-5, rtol=0)
