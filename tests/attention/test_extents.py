"""The allocator of a pool: no place is handed out twice, none is lost, and neighbours become one gap again."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.attention.memory.extents import Extents


@given(size=st.integers(1, 300), seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=150)
def test_extents_in_use_never_overlap_and_all_come_back(size, seed):
    rng = random.Random(seed)
    subject, owner, held = Extents(size), [None] * size, {}
    for number in range(120):
        if held and rng.random() < 0.45:
            name = rng.choice(list(held))
            start, length = held.pop(name)
            part = rng.randrange(1, length + 1)  # a node that was cut gives its parts back one by one
            for first, count in ((start, part), (start + part, length - part)):
                if count:
                    subject.free(first, count)
            owner[start : start + length] = [None] * length
        else:
            length = rng.randrange(1, max(2, size // 3))
            start = subject.allocate(length)
            longest = max(map(len, "".join("x" if each is None else " " for each in owner).split()), default=0)
            assert (start is None) == (longest < length)
            if start is not None:
                assert owner[start : start + length] == [None] * length
                owner[start : start + length] = [number] * length
                held[number] = start, length
        assert subject.num_free == owner.count(None)
    for start, length in held.values():
        subject.free(start, length)
    assert subject.allocate(size) == 0


def test_extents_freed_twice_are_refused():
    subject = Extents(10)
    assert subject.allocate(4) == 0
    subject.free(0, 4)
    with pytest.raises(ValueError, match="freed twice"):
        subject.free(0, 4)
    with pytest.raises(ValueError, match="within 10 places"):
        subject.free(8, 4)
