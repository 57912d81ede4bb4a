import pytest
from chains import chains
from hypothesis import given
from hypothesis import strategies as st

from segue.attention.segments import Segment, canonical_segments, num_tokens
from segue.attention.tree.node import chain_key
from segue.attention.tree.tree import SegmentTree


def distinct_tokens(rows):
    """Brute force: the set of (everything visible before and including it) of every token position."""
    seen = set()
    for row in rows:
        before = ()
        for segment in row:
            if segment.bidirectional:
                seen.update((before, segment, i) for i in range(len(segment)))
                before = (*before, segment)
            else:
                seen.update((before, segment.token_ids[: i + 1]) for i in range(len(segment)))
                before = (*before, segment)
    return len(seen)


@given(chains(max_rows=8))
def test_tree_of_random_rows_holds_each_distinct_token_once(rows):
    tree = SegmentTree()
    for row in rows:
        tree.add_row(tree.insert(row))
    assert sum(len(node) for node in tree) == distinct_tokens(rows)


@given(chains(max_rows=8))
def test_tree_end_of_row_spells_the_row(rows):
    tree = SegmentTree()
    ends = [tree.insert(row) for row in rows]
    for row, end in zip(rows, ends, strict=True):
        assert end.segments() == row
        assert end.stop == num_tokens(row)
        assert [node.start for node in end.path()] == [
            sum(len(n) for n in end.path()[:i]) for i in range(len(end.path()))
        ]


@given(chains(max_rows=8), st.randoms(use_true_random=False))
def test_tree_shape_does_not_depend_on_the_order_of_rows(rows, random):
    shapes = []
    for _ in range(2):
        tree = SegmentTree()
        for row in rows:
            tree.add_row(tree.insert(row))
        shapes.append(sorted((node.key(b"s").hex(), len(node), node.num_rows) for node in tree))
        random.shuffle(rows)
    assert shapes[0] == shapes[1]


@given(chains(max_rows=8))
def test_tree_after_all_rows_left_is_empty(rows):
    tree = SegmentTree()
    ends = []
    for row in rows:
        ends.append(tree.insert(row))
        tree.add_row(ends[-1])
    for end in ends:
        tree.remove_row(end)
    assert list(tree) == []


def test_insert_bidirectional_segments_with_common_beginning_shares_nothing():
    tree = SegmentTree()
    a, b = tree.insert([Segment((1, 2, 3), True)]), tree.insert([Segment((1, 2, 4), True)])
    assert a.path() == [a]
    assert b.path() == [b]


def test_insert_causal_runs_with_common_beginning_shares_it_by_token():
    tree = SegmentTree()
    a, b = tree.insert([Segment((1, 2, 3), False)]), tree.insert([Segment((1, 2, 4), False)])
    assert a.path()[0] is b.path()[0]
    assert a.path()[0].token_ids == (1, 2)


def test_insert_same_tokens_of_other_kind_shares_nothing():
    tree = SegmentTree()
    assert tree.insert([Segment((1, 2), True)]) is not tree.insert([Segment((1, 2), False)])


def test_insert_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        SegmentTree().insert([])


def test_split_of_bidirectional_node_is_refused():
    tree = SegmentTree()
    with pytest.raises(ValueError, match="atomic"):
        tree.split(tree.insert([Segment((1, 2), True)]), 1)


def test_chain_key_differs_by_salt_kind_and_tokens():
    keys = {
        chain_key(b"", Segment((1, 2), True)),
        chain_key(b"", Segment((1, 2), False)),
        chain_key(b"salt", Segment((1, 2), True)),
        chain_key(b"", Segment((1, 258), True)),
        chain_key(b"", Segment((1,), True)),
    }
    assert len(keys) == 5


def test_canonical_segments_merges_causal_neighbours_and_drops_empty_ones():
    chain = [Segment((1,), False), Segment((), True), Segment((2, 3), False), Segment((4,), True)]
    assert canonical_segments(chain, mask="segment") == (Segment((1, 2, 3), False), Segment((4,), True))
    assert canonical_segments(chain, mask="causal") == (Segment((1, 2, 3, 4), False),)
