"""Sliding windows, capped scores and sinks: every backend against the dense reference, on random trees."""

from typing import Any

import pytest
import torch
from chains import chains
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.masking_utils import create_sliding_window_causal_mask
from tree_backends import BACKENDS, NAMES
from tree_harness import SCALE, H, check_long_nodes, check_tree
from varlen_emulation import EmulatedBackend

from segue.attention.backend import LayerAttention
from segue.attention.visibility import block_sequence_ids, visible

SINKS = torch.linspace(-2.0, 3.0, H)
CAPPING = [(name, each) for name, each in zip(NAMES, BACKENDS, strict=True) if not isinstance(each, EmulatedBackend)]
ROWS = {"rows": chains(max_rows=6), "cut": st.integers(0, 8)}
TAILS = st.lists(st.integers(0, 40), min_size=6, max_size=6)


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
@given(**ROWS, tails=TAILS, window=st.integers(1, 50), has_sinks=st.booleans())
@settings(deadline=None, max_examples=50)
def test_windows_and_sinks_on_random_trees_equal_the_reference(backend, rows, cut, tails, window, has_sinks):
    check_tree(backend, rows, cut, tails, LayerAttention(SCALE, window, sinks=SINKS if has_sinks else None))


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("window", [1, 16, 17, 79, 80, 81, 129, 200])
def test_windows_over_long_nodes_and_deep_trees_equal_the_reference(backend, bidirectional, window):
    """Windows that end inside nodes of 80, at their borders, behind several of them, and inside the first."""
    check_long_nodes(backend, bidirectional, LayerAttention(SCALE, window))


@pytest.mark.parametrize("backend", [each for _, each in CAPPING], ids=[name for name, _ in CAPPING])
@given(**ROWS, tails=TAILS, window=st.none() | st.integers(1, 50), softcap=st.sampled_from([0.3, 2.0, 30.0]))
@settings(deadline=None, max_examples=30)
def test_capped_scores_on_random_trees_equal_the_reference(backend, rows, cut, tails, window, softcap):
    check_tree(backend, rows, cut, tails, LayerAttention(SCALE, window, softcap, SINKS))


@pytest.mark.parametrize("backend", [each for _, each in CAPPING], ids=[name for name, _ in CAPPING])
def test_capped_scores_over_long_nodes_equal_the_reference(backend):
    check_long_nodes(backend, False, LayerAttention(SCALE, None, 0.5))


def test_capped_scores_are_refused_by_the_kernel_that_does_not_compute_them():
    with pytest.raises(ValueError, match=r"does not cap scores, wanted a softcap of 5\.0"):
        check_long_nodes(EmulatedBackend(), True, LayerAttention(SCALE, softcap=5.0))


@given(rows=chains(max_rows=1), window=st.integers(1, 20), num_generated=st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_rule_of_windows_is_that_of_transformers(rows, window, num_generated):
    ids = block_sequence_ids(rows[0], num_generated)
    config: Any = LlamaConfig(hidden_size=8, num_attention_heads=1)
    config._attn_implementation, config.sliding_window = "eager", window
    mask: Any = create_sliding_window_causal_mask(
        config, torch.zeros(1, len(ids), 8), None, None, torch.arange(len(ids))[None], block_sequence_ids=ids[None]
    )
    assert torch.equal(mask[0, 0] == 0, visible(ids, window))


def test_window_of_no_token_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        LayerAttention(1.0, window=0)
