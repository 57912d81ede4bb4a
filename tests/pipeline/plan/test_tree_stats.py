"""The one-pass count of a dataset's tree, against the tree itself and against brute force."""

from itertools import product

from chains import chains
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.attention.segments import Segment
from segue.attention.tree.tree import SegmentTree
from segue.pipeline.ledger.chains import encode_chain
from segue.pipeline.plan.tree import TreeCounter, TreeStats, common_tokens
from segue.pipeline.plan.undeclared import UndeclaredPrefix

Chain = tuple[Segment, ...]
MASKS = st.sampled_from(["segment", "causal"])


def in_order(rows: list[Chain]) -> list[Chain]:
    return sorted(rows, key=encode_chain)


def count(rows: list[Chain], *, borders: frozenset[int] = frozenset(), num_workers: int = 1) -> TreeStats:
    """Statistics of rows in order; a unit ends before each row number in `borders`."""
    counter = TreeCounter(num_workers, min_undeclared_tokens=1)
    for number, row in enumerate(rows):
        if number in borders:
            counter.end_unit()
        counter.add(row, f"a:{number}")
    return counter.finish()


def tree_of(rows: list[Chain]) -> SegmentTree:
    tree = SegmentTree()
    for row in rows:
        tree.add_row(tree.insert(row))
    return tree


def distinct_tokens(rows: list[Chain]) -> int:
    return sum(len(node) for node in tree_of(rows))


@given(st.data(), MASKS)
def test_tree_stats_tokens_equal_the_trees(data, mask):
    rows = in_order(data.draw(chains(max_rows=8, mask=mask)))
    stats = count(rows)
    assert stats.num_requests == len(rows)
    assert stats.tokens_requested == sum(len(segment) for row in rows for segment in row)
    assert stats.tokens_distinct == distinct_tokens(rows)


@given(st.data(), MASKS)
def test_tree_stats_shared_nodes_equal_the_trees(data, mask):
    rows = in_order(data.draw(chains(max_rows=8, mask=mask)))
    found = {(node.num_rows, node.num_tokens, node.start, node.bidirectional) for node in count(rows).top_shared}
    shared = [node for node in tree_of(rows) if node.num_rows > 1]
    assert found == {(node.num_rows, len(node), node.start, node.bidirectional) for node in shared}
    assert sum(node.tokens_saved for node in count(rows).top_shared) == sum(len(n) * (n.num_rows - 1) for n in shared)
    for node in count(rows).top_shared:
        own = range(node.first_request, node.first_request + node.num_rows)
        end = node.start + node.num_tokens
        beside = [common_tokens(rows[node.first_request], row) >= end for row in rows]
        assert [number for number, has_it in enumerate(beside) if has_it] == list(own)


@settings(max_examples=60)
@given(st.data(), MASKS, st.integers(1, 3))
def test_tree_stats_bound_is_the_worst_assignment_of_units_to_workers(data, mask, num_workers):
    """No assignment computes more; each node alone can be made to cost what the bound counts for it."""
    rows = in_order(data.draw(chains(max_rows=6, mask=mask)))
    borders = frozenset(data.draw(st.sets(st.integers(1, 5))))
    units: list[list[Chain]] = [[]]
    for number, row in enumerate(rows):
        if number in borders and number:
            units.append([])
        units[-1].append(row)
    stats = count(rows, borders=borders, num_workers=num_workers)
    bound = stats.tokens_distinct + stats.extra_tokens_bound
    for workers in product(range(num_workers), repeat=len(units)):
        held = [[row for unit, w in zip(units, workers, strict=True) if w == own for row in unit] for own in range(3)]
        assert sum(distinct_tokens(own) for own in held if own) <= bound
    tree = tree_of(rows)
    ends = [[tree.insert(row) for row in unit] for unit in units]
    crossed = [(len(node), sum(any(node in end.path() for end in unit) for unit in ends)) for node in tree]
    assert stats.extra_tokens_bound == sum(tokens * (min(times, num_workers) - 1) for tokens, times in crossed)


def test_tree_stats_longest_rows_are_named_longest_first():
    rows = in_order([(Segment(tuple(range(3, 3 + length)), False),) for length in (2, 9, 4)])
    assert count(rows).longest == [(9, "a:2"), (4, "a:1"), (2, "a:0")]


def undeclared_by_brute_force(rows: list[Chain]) -> set[tuple[int, int]]:
    """(segments, tokens) of every branching point inside bidirectional segments at one place of the tree."""
    places: dict[tuple[Segment, ...], set[tuple[int, ...]]] = {}
    for row in rows:
        for index, segment in enumerate(row):
            if segment.bidirectional:
                places.setdefault(row[:index], set()).add(segment.token_ids)
    found = set()
    for place in places.values():
        for a, b in product(place, repeat=2):
            if a == b:
                continue
            shared = common_tokens((Segment(a, False),), (Segment(b, False),))
            members = [tokens for tokens in place if tokens[:shared] == a[:shared]]
            if shared:
                found.add((len(members), shared))
    return found


@given(st.data())
def test_tree_stats_undeclared_prefixes_equal_brute_force(data):
    rows = in_order(data.draw(chains(max_rows=8)))
    found = count(rows).undeclared
    assert {(prefix.num_segments, prefix.num_tokens) for prefix in found} == undeclared_by_brute_force(rows)
    assert all(prefix.tokens_lost == (prefix.num_segments - 1) * prefix.num_tokens for prefix in found)


def test_tree_stats_undeclared_prefix_is_not_diluted_by_a_neighbour_that_shares_less():
    rubric, other = (7,) * 10, (7, 7, 7, 4)
    messages = [(*rubric, own) for own in range(11, 16)] + [other]
    rows = in_order([(Segment(tokens, True), Segment((9,), False)) for tokens in messages for _ in range(2)])
    first, second = count(rows).undeclared
    assert first == UndeclaredPrefix(40, 5, 10, "a:2")
    assert second == UndeclaredPrefix(15, 6, 3, "a:0")


def test_tree_stats_causal_runs_have_nothing_undeclared():
    rows = in_order([(Segment((5, 6, 7, own), False),) for own in range(8)])
    assert count(rows).undeclared == []
