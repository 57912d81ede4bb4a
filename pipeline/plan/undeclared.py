"""Beginnings that messages have in common and cannot share, since a bidirectional segment is shared as a whole.

Counted in one pass over chains in depth-first order: for each place in the tree the branching points of the tokens of
the segments found there, which are the intervals of their longest common prefixes. Knows token ids; no text, no Ray.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from segue.attention.segments import Segment


@dataclass(frozen=True, slots=True, order=True)
class UndeclaredPrefix:
    """Different bidirectional segments, after the same beginning of the row, whose first tokens are the same."""

    tokens_lost: int  # what sharing those tokens would save
    num_segments: int
    num_tokens: int
    first_row: str  # src_path:src_row of the first row that has it


@dataclass(slots=True)
class _Place:
    """The segments seen so far at one depth, under the current path above it."""

    first_row: str  # of the segment that is there now
    num_segments: int = 1
    prefixes: list[tuple[int, int, str]] = field(default_factory=list)  # tokens, number of the first segment, its row


class UndeclaredPrefixes:
    """Feed chains in depth-first order with `add`; `finish` gives the largest, best first."""

    def __init__(self, min_tokens: int, max_kept: int) -> None:
        self._min_tokens = min_tokens
        self._max_kept = max_kept
        self._found: list[UndeclaredPrefix] = []
        self._previous: tuple[Segment, ...] = ()
        self._places: list[_Place] = []  # one for each segment of the previous chain

    def add(self, segments: tuple[Segment, ...], row: str) -> None:
        """The next row."""
        depth = _num_equal(self._previous, segments)
        if depth == len(segments) == len(self._previous):
            return
        self._leave(depth + 1)
        if depth < len(self._places):
            self._branch(depth, segments, row)
        self._places += [_Place(row) for _ in segments[len(self._places) :]]
        self._previous = segments

    def finish(self) -> list[UndeclaredPrefix]:
        """The prefixes that lose most; no row may follow."""
        self._leave(0)
        return sorted(self._found, reverse=True)

    def _branch(self, depth: int, segments: Sequence[Segment], row: str) -> None:
        """Another segment where there was one already, or none if the chain ends here."""
        if depth == len(segments):
            self._leave(depth)
            return
        old, new = self._previous[depth], segments[depth]
        place = self._places[depth]
        shared = common_prefix(old.token_ids, new.token_ids) if old.bidirectional and new.bidirectional else 0
        start = self._close(place, shared)
        if shared >= self._min_tokens and (not place.prefixes or place.prefixes[-1][0] < shared):
            place.prefixes.append((shared, *start))
        place.num_segments += 1
        place.first_row = row

    def _close(self, place: _Place, shared: int) -> tuple[int, str]:
        """End the prefixes longer than `shared`; returns the first segment of the last one, else the current one."""
        start = (place.num_segments - 1, place.first_row)
        while place.prefixes and place.prefixes[-1][0] > shared:
            tokens, *_ = prefix = place.prefixes.pop()
            start = prefix[1:]
            count = place.num_segments - start[0]
            heapq.heappush(self._found, UndeclaredPrefix((count - 1) * tokens, count, tokens, start[1]))
            if len(self._found) > self._max_kept:
                heapq.heappop(self._found)
        return start

    def _leave(self, depth: int) -> None:
        """What follows lies elsewhere from this depth on."""
        for place in self._places[depth:]:
            self._close(place, 0)
        del self._places[depth:]


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many leading tokens are equal. By halving: comparing slices runs at the speed of C."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _num_equal(one: Sequence[Segment], other: Sequence[Segment]) -> int:
    """Leading segments that two chains have in common, each as a whole."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
