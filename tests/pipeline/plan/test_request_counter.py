"""The plan's count of scoring requests, against the tree that an engine would build of them."""

from chains import chains, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.attention.segments import Segment, canonical_segments, num_tokens
from segue.attention.tree.tree import SegmentTree
from segue.pipeline.ledger.chains import shared_chains
from segue.pipeline.plan.requests import RequestCounter
from segue.pipeline.plan.tree import TreeCounter, TreeStats
from segue.workers.rows.request import ScoringRequest
from segue.workers.scoring.windows import rolling_requests

Row = list[ScoringRequest]


def count(rows: list[Row], borders: frozenset[int] = frozenset(), num_workers: int = 1) -> TreeStats:
    """Rows in the plan's order: that of each one's smallest request."""
    counter = RequestCounter(TreeCounter(num_workers))
    ordered = sorted(rows, key=lambda row: min(shared_chains(row)))
    for number, row in enumerate(ordered):
        if number in borders:
            counter.end_unit()
        counter.add_scored(min(shared_chains(row)), row, f"a:{number}")
    return counter.finish()


def fed(request: ScoringRequest) -> tuple[Segment, ...]:
    return canonical_segments(request.fed_segments, mask="segment")


@st.composite
def scoring_rows(draw: st.DrawFn) -> list[Row]:
    """Rows whose contexts extend each other, sometimes into another row's choices."""
    mask = draw(st.sampled_from(["segment", "causal"]))
    contexts = draw(chains(max_rows=6, mask=mask))
    rows = [
        [ScoringRequest(context, choice) for choice in draw(st.lists(tokens, min_size=1, max_size=4))]
        for context in contexts
    ]
    extended = [
        canonical_segments([*request.context, Segment(request.continuation, False)], mask=mask)
        for row in rows
        for request in row
        if draw(st.booleans())
    ]
    return rows + [[ScoringRequest(context, draw(tokens))] for context in extended]


@given(scoring_rows())
@settings(deadline=None)
def test_request_count_equals_the_tree_of_all_requests(rows):
    tree = SegmentTree()
    for row in rows:
        for request in row:
            tree.add_row(tree.insert(fed(request)))
    stats = count(rows)
    assert stats.tokens_distinct == sum(len(node) for node in tree)
    assert stats.tokens_requested == sum(num_tokens(fed(request)) for row in rows for request in row)
    assert (stats.num_rows, stats.num_requests) == (len(rows), sum(map(len, rows)))


@given(scoring_rows(), st.sets(st.integers(1, 8)), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_request_bound_is_never_below_what_workers_compute_if_units_alternate(rows, borders, num_workers):
    stats = count(rows, frozenset(borders), num_workers)
    trees = [SegmentTree() for _ in range(num_workers)]
    unit = 0
    for number, row in enumerate(sorted(rows, key=lambda row: min(shared_chains(row)))):
        unit += number in borders
        for request in row:
            trees[unit % num_workers].add_row(trees[unit % num_workers].insert(fed(request)))
    computed = sum(len(node) for tree in trees for node in tree)
    assert stats.tokens_distinct <= computed <= stats.tokens_distinct + stats.extra_tokens_bound


def test_windows_of_a_text_after_the_first_share_nothing_and_equal_texts_are_counted_once():
    text = tuple(range(10, 45))
    windows = list(rolling_requests(text, 1, 16))
    other = list(rolling_requests((*text[:-1], 99), 1, 16))
    fed_tokens = sum(num_tokens(request.fed_segments) for request in windows)
    assert [request.is_shared for request in windows] == [True, False, False]
    assert count([windows]).tokens_distinct == fed_tokens
    assert count([windows, windows]).tokens_distinct == fed_tokens
    # The first window is the same; of the others only the last differs.
    assert count([windows, other]).tokens_distinct == fed_tokens + num_tokens(other[-1].fed_segments)
