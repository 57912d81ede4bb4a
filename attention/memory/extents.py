"""Ranges of consecutive places: allocated, freed, and joined with free neighbours.

Segregated fit: free ranges are sorted into classes by powers of two of their length, so that finding one takes a few
lookups, however many there are. Knows integers only.
"""


class Extents:
    """Which places of `[0, size)` are free. Whoever allocates a range remembers it, and may free it in parts."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_free = 0
        self._length_at: dict[int, int] = {}  # by first place of a free range
        self._start_before: dict[int, int] = {}  # by the place after a free range
        self._by_class: list[dict[int, None]] = [{} for _ in range(size.bit_length() + 1)]  # class k: 2^k to 2^(k+1)
        self._add(0, size)

    def allocate(self, length: int) -> int | None:
        """The first place of the allocated range; None if no free range is long enough."""
        start = self._find(length)
        if start is None:
            return None
        found = self._length_at[start]
        self._remove(start)
        self._add(start + length, found - length)
        return start

    def free(self, start: int, length: int) -> None:
        """Free a range, or a part of one. Raises ValueError if a place of it is free already."""
        stop = start + length
        if start < 0 or length < 1 or stop > self.size:
            raise ValueError(f"wanted a range within {self.size} places, got {start} to {stop}")
        before, after = self._start_before.get(start), self._length_at.get(stop)
        if start in self._length_at or stop in self._start_before:
            raise ValueError(f"places {start} to {stop} are freed twice")
        if before is not None:
            self._remove(before)
            start = before
        if after is not None:
            self._remove(stop)
            stop += after
        self._add(start, stop - start)

    def grow(self, size: int) -> None:
        """More places, behind the others."""
        added, start = size - self.size, self.size
        self._by_class += [{} for _ in range(len(self._by_class), size.bit_length() + 1)]
        self.size = size
        self.free(start, added)

    def _find(self, length: int) -> int | None:
        # In a higher class the first range is long enough; in the length's own class some may not be.
        for ranges in self._by_class[(length - 1).bit_length() :]:
            for start in ranges:
                return start
        own = self._by_class[length.bit_length() - 1]
        return next((start for start in own if self._length_at[start] >= length), None)

    def _add(self, start: int, length: int) -> None:
        if length:
            self._length_at[start] = length
            self._start_before[start + length] = start
            self._by_class[length.bit_length() - 1][start] = None
            self.num_free += length

    def _remove(self, start: int) -> None:
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        del self._by_class[length.bit_length() - 1][start]
        self.num_free -= length
