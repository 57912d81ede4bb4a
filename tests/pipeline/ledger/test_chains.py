"""Chains as bytes: nothing is lost, and byte order is the depth-first order of the tree."""

from itertools import groupby

import pytest
from chains import chains
from hypothesis import given
from hypothesis import strategies as st

from segue.attention.segments import Segment, canonical_segments
from segue.attention.tree.tree import SegmentTree
from segue.pipeline.ledger.chains import decode_chain, encode_chain

MASKS = st.sampled_from(["segment", "causal"])


@given(st.data(), MASKS)
def test_chain_round_trip_keeps_every_segment(data, mask):
    for row in data.draw(chains(mask=mask)):
        assert decode_chain(encode_chain(row)) == row


def test_chain_of_a_row_with_an_error_is_empty():
    assert encode_chain(()) == b""
    assert decode_chain(b"") == ()


@pytest.mark.parametrize("bidirectional", [True, False])
def test_chain_small_and_large_token_ids_are_told_from_marks(bidirectional):
    chain = (Segment((0, 1, 2, 3, 2**31 - 1), bidirectional), Segment((0,), not bidirectional), Segment((1,), True))
    assert decode_chain(encode_chain(chain)) == chain


def test_chain_same_tokens_under_another_rule_are_another_chain():
    tokens = (5, 6)
    assert encode_chain((Segment(tokens, True),)) != encode_chain((Segment(tokens, False),))


@given(st.data(), MASKS)
def test_sorted_chains_rows_that_share_a_node_are_contiguous(data, mask):
    rows = sorted(data.draw(chains(max_rows=10, mask=mask)), key=encode_chain)
    tree = SegmentTree()
    ends = [tree.insert(row) for row in rows]
    for node in tree:
        below = [node in end.path() for end in ends]
        assert [key for key, _ in groupby(below)].count(True) == 1


@given(st.data(), MASKS)
def test_sorted_chains_prompt_precedes_its_continuations(data, mask):
    rows = sorted(data.draw(chains(max_rows=10, mask=mask)), key=encode_chain)
    tree = SegmentTree()
    ends = [tree.insert(row) for row in rows]
    for index, end in enumerate(ends):
        continuations = [later for later in ends[:index] if end in later.path() and later is not end]
        assert not continuations


@given(st.data())
def test_chain_order_of_causal_prompts_is_the_order_of_their_tokens(data):
    tokens = data.draw(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4), min_size=2, max_size=6))
    rows = [canonical_segments([Segment(tuple(ids), False)], mask="causal") for ids in tokens]
    assert sorted(rows, key=encode_chain) == sorted(rows, key=lambda row: row[0].token_ids)
