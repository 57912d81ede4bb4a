"""A pool of keys and values: what a node or a tail holds stays its own, wherever it is moved to."""

import gc
import random
from unittest.mock import patch
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engines import memory_of, over_backend, shared_prompts, tiny_engine

from segue.attention.memory.budget import KVMemoryExceeded, KVShape
from segue.attention.memory.pool import Extent, KVPool
from segue.workers.rows.params import SamplingParams

SHAPE = KVShape(2, 1, 2, torch.float32)
TOKENS = 400


def pool(num_tokens=TOKENS):
    return KVPool(SHAPE, num_tokens * SHAPE.bytes_per_token + 3)  # bytes that are no whole token are no token


def fill(subject, start, length, number):
    for layer, tensor in enumerate(subject.tensors):
        tensor[:, start : start + length] = number + 0.1 * layer


def holds(subject, start, length, number):
    return all(
        bool((tensor[:, start : start + length] == torch.tensor(number + 0.1 * layer)).all())
        for layer, tensor in enumerate(subject.tensors)
    )


class Holder:
    """Nodes and tails with a number each, written into all they have."""

    def __init__(self, subject, seed):
        self.pool, self.rng = subject, random.Random(seed)
        self.nodes, self.tails = {}, {}

    def act(self, number):
        try:
            self.rng.choice([self.add, self.add, self.cut, self.free, self.open, self.grow, self.grow, self.close])(
                number
            )
        except KVMemoryExceeded:
            return

    def add(self, number):
        extent = self.pool.allocate_node(self.rng.randrange(1, 60))
        fill(self.pool, extent.start, extent.length, number)
        self.nodes[extent] = number

    def cut(self, _):
        long = [extent for extent in self.nodes if extent.length > 1]
        if long:
            extent = self.rng.choice(long)
            number = self.nodes.pop(extent)
            self.nodes |= dict.fromkeys(extent.split(self.rng.randrange(1, extent.length)), number)

    def free(self, _):
        if self.nodes:
            extent = self.rng.choice(list(self.nodes))
            del self.nodes[extent]
            self.pool.free_node(extent)

    def open(self, number):
        self.tails[self.pool.open_tail()] = number

    def grow(self, _):
        for tail, number in self.tails.items():
            for _ in range(self.rng.randrange(20)):
                self.pool.grow_tail(tail)
                fill(self.pool, tail.start + tail.length, 1, number)
                tail.length += 1

    def close(self, _):
        if self.tails:
            tail = self.rng.choice(list(self.tails))
            del self.tails[tail]
            self.pool.close_tail(tail)

    def check(self):
        for extent, number in self.nodes.items():
            assert holds(self.pool, extent.start, extent.length, number)
        for tail, number in self.tails.items():
            assert holds(self.pool, tail.start, tail.length, number)
        used = sum(extent.length for extent in self.nodes) + sum(tail.capacity for tail in self.tails)
        assert self.pool.allocated_bytes == used * SHAPE.bytes_per_token <= self.pool.budget_bytes


@given(seed=st.integers(0, 100_000))
@settings(deadline=None, max_examples=60)
def test_pool_keeps_what_nodes_and_tails_hold_through_cuts_moves_and_growth(seed):
    holder = Holder(pool(), seed)
    for number in range(60):
        holder.act(number)
        holder.check()
    with patch("segue.attention.memory.pool.MOVED_TOKENS", 7):
        holder.pool.shrink(holder.pool.allocated_bytes)
    holder.check()
    assert holder.pool.grow(2 * TOKENS * SHAPE.bytes_per_token)
    holder.check()
    for number in range(60, 90):
        holder.act(number)
        holder.check()
    for extent in list(holder.nodes):
        holder.pool.free_node(extent)
    for tail in list(holder.tails):
        holder.pool.close_tail(tail)
    assert holder.pool.allocated_bytes == 0


def test_pool_in_pieces_moves_what_is_in_use_instead_of_refusing():
    subject = pool(100)
    extents = [subject.allocate_node(10) for _ in range(10)]
    for number, extent in enumerate(extents):
        fill(subject, extent.start, 10, number)
    for extent in extents[::2]:
        subject.free_node(extent)
    whole = subject.allocate_node(50)
    assert (whole.length, subject.num_compactions) == (50, 1)
    assert all(holds(subject, extent.start, 10, number) for number, extent in list(enumerate(extents))[1::2])
    with pytest.raises(KVMemoryExceeded):
        subject.allocate_node(1)


def test_pool_whose_extents_are_not_told_that_they_moved_fails_the_test_above(monkeypatch):
    compact = KVPool._compact

    def without_telling(self, size):
        starts = {extent: extent.start for extent in self._nodes}
        compact(self, size)
        for extent, start in starts.items():
            extent.start = start

    monkeypatch.setattr(KVPool, "_compact", without_telling)
    with pytest.raises(Exception):  # noqa: B017, PT011  (hypothesis may find several ways to fail)
        test_pool_keeps_what_nodes_and_tails_hold_through_cuts_moves_and_growth()


def test_pool_of_an_engine_that_nobody_has_is_freed_at_once():
    """On a GPU it is most of the memory, and the next engine wants it."""
    with over_backend("varlen"):
        engine = tiny_engine()
        engine.generate(shared_prompts(4), SamplingParams(max_tokens=3))
        memory = memory_of(engine)
        assert isinstance(memory, KVPool)
        tensor = ref(memory.tensors[0])
        gc.collect()
        gc.disable()
        try:
            del engine, memory
            assert tensor() is None
        finally:
            gc.enable()


def test_pool_takes_back_only_what_it_gave():
    with pytest.raises(KeyError):
        pool().free_node(Extent(pool(), 0, 3))
