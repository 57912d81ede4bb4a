"""The requests of a plan's rows in depth-first order, for the counter of its tree.

A row of a scoring task has several requests, and rows come in the order of their smallest ones. So a request waits
until no row can come before it: for ordinary data until the next row. Knows token ids; no text, no Ray.
"""

import hashlib
import heapq
from collections.abc import Sequence
from itertools import count

from segue.pipeline.ledger.chains import decode_chain, shared_chains
from segue.pipeline.plan.tree import TreeCounter, TreeStats
from segue.workers.rows.request import ScoringRequest

MAX_WAITING_BYTES = 1 << 28  # beyond, requests are counted before their turn, and tokens they share as new


class RequestCounter:
    """Feed rows in the plan's order with `add` and `add_scored`, unit borders with `end_unit`; read with `finish`."""

    def __init__(self, counter: TreeCounter) -> None:
        self._counter = counter
        self._num_rows = 0
        self._waiting: list[tuple[bytes, int, str, int]] = []  # chain, order of arrival, row, unit
        self._waiting_bytes = 0
        self._arrivals = count()
        self._unit = 0  # of the rows that come
        self._last_unit = 0  # of the request that was counted last
        self._private: set[bytes] = set()  # requests of this unit that share nothing; equal ones are computed once

    def add(self, chain: bytes, row: str) -> None:
        """A row with one request, or with an error and no chain."""
        self._num_rows += 1
        if chain:
            self._release(chain)
            self._wait(chain, row)

    def add_scored(self, chain: bytes, requests: Sequence[ScoringRequest], row: str) -> None:
        """A row with several requests, of which `chain` is the smallest."""
        self._num_rows += 1
        self._release(chain)
        for shared in shared_chains(requests):
            self._wait(shared, row)
        for request in requests:
            if not request.is_shared:
                self._count_private(request, row)

    def end_unit(self) -> None:
        """The next row belongs to another unit, which another worker may get."""
        self._unit += 1
        self._private.clear()

    def finish(self) -> TreeStats:
        """The totals; no row may follow."""
        self._release(None)
        stats = self._counter.finish()
        stats.num_rows = self._num_rows
        return stats

    def _wait(self, chain: bytes, row: str) -> None:
        heapq.heappush(self._waiting, (chain, next(self._arrivals), row, self._unit))
        self._waiting_bytes += len(chain)
        while self._waiting_bytes > MAX_WAITING_BYTES:
            self._count_next()

    def _release(self, limit: bytes | None) -> None:
        """Count what comes before every request of the rows to come."""
        while self._waiting and (limit is None or self._waiting[0][0] <= limit):
            self._count_next()

    def _count_next(self) -> None:
        chain, _, row, unit = heapq.heappop(self._waiting)
        self._waiting_bytes -= len(chain)
        if unit != self._last_unit:
            self._counter.end_unit()
            self._last_unit = unit
        self._counter.add(decode_chain(chain), row)

    def _count_private(self, request: ScoringRequest, row: str) -> None:
        tokens = [token for segment in request.fed_segments for token in segment.token_ids]
        identity = (len(request.continuation), tokens, request.continuation[-1])
        key = hashlib.blake2b(repr(identity).encode(), digest_size=16).digest()
        self._counter.add_private(len(tokens), row, is_new=key not in self._private)
        self._private.add(key)
