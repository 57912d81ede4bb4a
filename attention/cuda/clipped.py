"""Blocks of queries over earlier keys as a sliding window leaves them: rectangles, and squares of which half is seen.

A query at position `p` sees the keys from position `p - window + 1` on. Of a run of queries, the first `n` that do not
see all keys of a node see, of a square of `n` keys, one less each, and all keys behind that square. Kernels take one
window for a call, whatever the place of a sequence's keys; in these squares it is the same for all.

Knows integers only.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from segue.attention.tree.blocks import StepBlocks

Block = tuple[int, int, int, int]  # first query, number of queries, place of the first key, number of keys


@dataclass(frozen=True, slots=True)
class Rectangle:
    """All queries `[start, stop)` over `num_keys` keys. Each query stands at or behind the last key."""

    start: int
    stop: int
    place: int  # of the first key, in the pool
    num_keys: int
    position: int  # of the first key, in its row


@dataclass(frozen=True, slots=True)
class _Run:
    """Queries at consecutive positions."""

    start: int
    stop: int
    position: int


def clipped(
    blocks: StepBlocks, rectangles: Iterable[Rectangle], window: int | None, most_queries: int
) -> tuple[list[Block], list[Block]]:
    """-> (rectangles, squares). A square has as many keys as queries, at most `most_queries`, and its query `i` sees
    the keys from number `i` on.
    """
    dense: list[Block] = []
    leaving: list[Block] = []
    runs = _runs(blocks, most_queries) if window is not None else []
    starts = [run.start for run in runs]
    for each in rectangles:
        if window is None or max(blocks.position_ids[each.start : each.stop]) - each.position < window:
            dense.append((each.start, each.stop - each.start, each.place, each.num_keys))
            continue
        for run in runs[bisect_left(starts, each.start) : bisect_left(starts, each.stop)]:
            _clip(run, each, window, dense, leaving)
    return dense, leaving


def _runs(blocks: StepBlocks, most_queries: int) -> Sequence[_Run]:
    """All queries of a step, in order, at most so many in a run."""
    own = [_Run(block.start, block.stop, block.node.start) for block in blocks.self_blocks]
    own += [_Run(index, index + 1, blocks.position_ids[index]) for index in blocks.decode_index]
    return [piece for run in sorted(own, key=lambda run: run.start) for piece in _pieces(run, most_queries)]


def _pieces(run: _Run, most_queries: int) -> Iterator[_Run]:
    for start in range(run.start, run.stop, most_queries):
        yield _Run(start, min(start + most_queries, run.stop), run.position + start - run.start)


def _clip(run: _Run, keys: Rectangle, window: int, dense: list[Block], leaving: list[Block]) -> None:
    """Append what the queries of a run see of some keys."""
    num_queries = run.stop - run.start
    first_seen = run.position - window + 1 - keys.position  # number of the first key that the first query sees
    num_whole = min(max(0, 1 - first_seen), num_queries)  # queries that see all keys
    if num_whole:
        dense.append((run.start, num_whole, keys.place, keys.num_keys))
    first_seen += num_whole
    num_rest = min(num_queries - num_whole, keys.num_keys - first_seen)  # further queries see none
    if num_rest < 1:
        return
    start = run.start + num_whole
    leaving.append((start, num_rest, keys.place + first_seen, num_rest))
    seen_by_all = first_seen + num_rest
    if seen_by_all < keys.num_keys:
        dense.append((start, num_rest, keys.place + seen_by_all, keys.num_keys - seen_by_all))
