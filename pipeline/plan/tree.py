"""What the segment tree of a whole dataset looks like, counted in one pass over rows in depth-first order.

Holds one path of the tree at a time, so memory does not grow with the rows. Knows token ids; no text, no Ray.
"""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from segue.attention.segments import Segment, num_tokens
from segue.pipeline.ledger.manifest import LONGEST_ROWS, TOP_NODES
from segue.pipeline.plan.undeclared import UndeclaredPrefix, UndeclaredPrefixes, common_prefix

MIN_UNDECLARED_TOKENS = 64  # a shorter common beginning is not worth telling


@dataclass(frozen=True, slots=True, order=True)
class SharedNode:
    """Consecutive tokens that several rows have at the same place, after the same beginning."""

    tokens_saved: int
    num_rows: int  # requests, where rows have several
    num_tokens: int
    start: int  # position of the first token
    bidirectional: bool
    first_row: str  # src_path:src_row of the first row that has it
    first_request: int  # its place in depth-first order: a node's requests are the `num_rows` from there on


@dataclass(slots=True)
class TreeStats:
    """Totals of a plan."""

    num_rows: int = 0  # of the dataset; set by the caller of the counter
    num_requests: int = 0  # a row of a scoring task has one for each choice, or for each window of its text
    tokens_requested: int = 0  # what computing every request alone would feed
    tokens_distinct: int = 0  # what one worker computes
    extra_tokens_bound: int = 0  # what `num_workers` workers may compute beyond that, wherever units land
    top_shared: list[SharedNode] = field(default_factory=list)
    undeclared: list[UndeclaredPrefix] = field(default_factory=list)
    longest: list[tuple[int, str]] = field(default_factory=list)  # tokens, row


@dataclass(slots=True)
class _Open:
    """A stretch of the current path that all rows since `first_row` have."""

    start: int
    stop: int
    bidirectional: bool
    num_rows: int
    first_row: str
    first_request: int


class TreeCounter:
    """Feed requests in depth-first order with `add`, unit borders with `end_unit`; read with `finish`."""

    def __init__(self, num_workers: int = 1, *, min_undeclared_tokens: int = MIN_UNDECLARED_TOKENS) -> None:
        self.stats = TreeStats()
        self._num_workers = num_workers
        self._previous: tuple[Segment, ...] = ()
        self._open: list[_Open] = []
        self._top: list[SharedNode] = []
        self._undeclared = UndeclaredPrefixes(min_undeclared_tokens, TOP_NODES)
        self._crossings: list[int] = []  # for each position of the path, the unit borders it has crossed
        self._border_pending = False
        self._num_ordered = 0  # requests in depth-first order so far

    def add(self, segments: tuple[Segment, ...], row: str) -> int:
        """Count a request; returns the tokens it adds to those before it."""
        length, common = num_tokens(segments), common_tokens(self._previous, segments)
        self._undeclared.add(segments, row)
        self._close(common)
        for part in self._open:
            part.num_rows += 1
        self._open += _parts_beyond(segments, common, row, self._num_ordered)
        self._num_ordered += 1
        del self._crossings[common:]
        if self._border_pending:
            self._cross(common)
        self._previous, self._border_pending = segments, False
        stats = self.stats
        stats.num_requests += 1
        stats.tokens_requested += length
        stats.tokens_distinct += length - common
        _keep_largest(stats.longest, (length, row), LONGEST_ROWS)
        return length - common

    def add_private(self, length: int, row: str, *, is_new: bool) -> None:
        """Count a request that shares nothing, at any time; `is_new` unless it equals one that is computed."""
        self.stats.num_requests += 1
        self.stats.tokens_requested += length
        self.stats.tokens_distinct += length if is_new else 0
        _keep_largest(self.stats.longest, (length, row), LONGEST_ROWS)

    def end_unit(self) -> None:
        """The next request belongs to another unit, which another worker may get."""
        self._border_pending = True

    def finish(self) -> TreeStats:
        """The totals; no request may follow."""
        self._close(0)
        self.stats.top_shared = sorted(self._top, reverse=True)
        self.stats.undeclared = self._undeclared.finish()
        self.stats.longest.sort(reverse=True)
        return self.stats

    def _cross(self, common: int) -> None:
        """Each worker computes a stretch once at most, and each unit that has it may land on another worker."""
        self._crossings += [0] * (common - len(self._crossings))
        # Deeper positions have crossed fewer borders; those that every worker may have are counted already.
        start = bisect_left(self._crossings, True, hi=common, key=lambda times: times + 1 < self._num_workers)
        for position in range(start, common):
            self._crossings[position] += 1
        self.stats.extra_tokens_bound += common - start

    def _close(self, common: int) -> None:
        """End what reaches beyond `common`, cutting a stretch there if it must be cut."""
        while self._open and self._open[-1].stop > common:
            part = self._open.pop()
            start = max(part.start, common)
            if part.num_rows > 1:
                length = part.stop - start
                saved = (part.num_rows - 1) * length
                where = part.bidirectional, part.first_row, part.first_request
                _keep_largest(self._top, SharedNode(saved, part.num_rows, length, start, *where), TOP_NODES)
            if part.start < common:
                self._open.append(replace(part, stop=common))
                return


def common_tokens(one: Sequence[Segment], other: Sequence[Segment]) -> int:
    """How many leading tokens two chains share: whole bidirectional segments, single tokens of causal runs."""
    shared = 0
    for a, b in zip(one, other, strict=False):
        if a.bidirectional != b.bidirectional:
            return shared
        if a.token_ids == b.token_ids:
            shared += len(a)
            continue
        return shared if a.bidirectional else shared + common_prefix(a.token_ids, b.token_ids)
    return shared


def _parts_beyond(segments: Sequence[Segment], common: int, row: str, request: int) -> list[_Open]:
    parts, start = [], 0
    for segment in segments:
        stop = start + len(segment)
        if stop > common:
            parts.append(_Open(max(start, common), stop, segment.bidirectional, 1, row, request))
        start = stop
    return parts


def _keep_largest(heap: list, item, size: int) -> None:
    heapq.heappush(heap, item)
    if len(heap) > size:
        heapq.heappop(heap)
