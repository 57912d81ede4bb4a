"""Who owns a node's keys, counts and idleness: `NodeCache` alone, also when a causal run is cut under it."""

import ast
import random
from pathlib import Path

import pytest
import torch
from chains import chains
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.attention.memory.budget import KVMemoryExceeded, KVShape
from segue.attention.memory.pieces import KVPieces, Piece
from segue.attention.segments import Segment
from segue.attention.tree import cache
from segue.attention.tree.cache import NodeCache
from segue.attention.tree.node import Node

ROOT = Path(__file__).parents[2]
SHAPE = KVShape(1, 1, 1, torch.float32)


def nodes_for(num_tokens: int) -> NodeCache:
    return NodeCache(KVPieces(SHAPE, num_tokens * SHAPE.bytes_per_token))


def run(first: int, length: int) -> list[Segment]:
    return [Segment(tuple(range(first, first + length)), False)]


class Rows:
    """Rows that come, hold, compute and leave in any order, as a scheduler makes them."""

    def __init__(self, num_tokens: int, seed: int) -> None:
        self.nodes, self.random = nodes_for(num_tokens), random.Random(seed)
        self.waiting: list[Node] = []
        self.held: list[Node] = []

    def come(self, chain: tuple[Segment, ...]) -> None:
        self.waiting.append(self.nodes.insert(chain))
        self.nodes.add_row(self.waiting[-1])

    def hold(self) -> None:
        if not self.waiting:
            return
        end = self.waiting.pop(self.random.randrange(len(self.waiting)))
        try:
            self.nodes.acquire(end)
        except KVMemoryExceeded:
            self.nodes.remove_row(end)
        else:
            self.held.append(end)

    def compute(self) -> None:
        if self.held:
            path = self.random.choice(self.held).path()
            if len(path[-1]) > 1 and not path[-1].bidirectional and not path[-1].is_computed:
                path.insert(-1, self.nodes.split(path[-1], 1))  # as a long prompt is computed in pieces
            for node in path:
                self.nodes.keep_computed(node, "hidden")

    def leave(self) -> None:
        if self.held:
            end = self.held.pop(self.random.randrange(len(self.held)))
            self.nodes.release(end)
            self.nodes.remove_row(end)

    def check(self) -> None:
        owners = [node for node in self.nodes if node.kv is not None]
        tokens = sum(len(node) for node in owners)
        assert self.nodes.memory.allocated_bytes == tokens * SHAPE.bytes_per_token
        assert all(isinstance(node.kv, Piece) and node.kv.num_tokens == len(node) for node in owners)
        assert all(node.parent.kv is not None for node in owners if node.parent and not node.parent.is_root)
        for node in self.nodes:
            held = sum(node in end.path() for end in self.held)
            assert (node.num_active, node.num_rows) == (held, held + sum(node in end.path() for end in self.waiting))
        kept = sum(len(node) for node in owners if not node.num_active and not node.is_shared)
        assert kept <= cache.UNSHARED_TOKENS

    def end(self) -> None:
        while self.held:
            self.leave()
        while self.waiting:
            self.nodes.remove_row(self.waiting.pop())
        assert self.nodes.make_room(self.nodes.memory.budget_tokens)
        assert list(self.nodes) == []


@given(rows=chains(max_rows=12), budget=st.integers(10, 80), seed=st.integers(0, 1000), unshared=st.integers(0, 30))
@settings(deadline=None, max_examples=150)
def test_memory_and_counts_of_nodes_are_right_at_every_moment_and_idle_nodes_can_all_be_evicted(
    rows, budget, seed, unshared
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "UNSHARED_TOKENS", unshared)
        patch.setattr(cache, "UNSHARED_SHARE", 0.0)
        subject = Rows(budget, seed)
        for chain in rows:
            subject.come(chain)
            for act in subject.random.choices([subject.hold, subject.compute, subject.leave], k=4):
                act()
                subject.check()
        subject.end()


def test_idle_node_that_a_waiting_row_cuts_gives_all_its_memory_to_a_row_that_needs_it():
    """A false ROW_OOM: the upper half of the cut was counted as memory in use and never evicted."""
    nodes = nodes_for(2000)
    done, large = nodes.insert(run(0, 1000)), nodes.insert(run(5000, 1900))
    nodes.add_row(done)
    nodes.acquire(done)
    nodes.keep_computed(done, "hidden")
    nodes.release(done)
    nodes.remove_row(done)
    nodes.add_row(large)
    nodes.add_row(nodes.insert([Segment((*range(500), 9000), False)]))  # waits, and shares 500 tokens with the first
    assert nodes.acquire(large) == 0
    assert nodes.memory.allocated_bytes == 1900 * SHAPE.bytes_per_token


def test_halves_of_an_idle_node_are_evicted_lower_half_first():
    nodes = nodes_for(100)
    end = nodes.insert(run(0, 60))
    nodes.acquire(end)
    nodes.keep_computed(end, "hidden")
    nodes.release(end)
    upper = nodes.split(end, 20)
    assert nodes.make_room(50)
    assert (end.kv, upper.is_computed) == (None, True)
    assert nodes.memory.allocated_bytes == 20 * SHAPE.bytes_per_token


def test_node_without_memory_cannot_be_called_computed():
    nodes = nodes_for(10)
    with pytest.raises(ValueError, match="no KV memory"):
        nodes.keep_computed(nodes.insert(run(0, 3)), "hidden")


# -- the sole writer

FIELDS = {*Node.__slots__} - {"start"}  # extents and tails have a start as well
OF_OTHERS = {"stats.num_rows", "self.stats.num_rows", "part.num_rows"}  # counts of an engine and of a plan


def writes_of_node_fields(source: str) -> list[str]:
    """Assignments to, and deletions of, an attribute named like a field of `Node`, or an item of one."""
    targets = []
    for each in ast.walk(ast.parse(source)):
        is_written = isinstance(each, ast.Attribute | ast.Subscript) and isinstance(each.ctx, ast.Store | ast.Del)
        target = each.value if is_written and isinstance(each, ast.Subscript) else each
        if is_written and isinstance(target, ast.Attribute) and target.attr in FIELDS:
            targets.append(ast.unparse(target))
    return [target for target in targets if target not in OF_OTHERS]


def test_nobody_outside_the_tree_writes_a_field_of_a_node():
    found = {}
    for package in ("attention", "workers", "pipeline", "jobs", "tests"):
        for path in (ROOT / package).rglob("*.py"):
            if not path.is_relative_to(ROOT / "attention" / "tree"):
                found |= {str(path): writes for writes in [writes_of_node_fields(path.read_text())] if writes}
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "node.is_computed = True",
        "a.b.num_active += 1",
        "node.kv, x = 1, 2",
        "del node.children[3]",
        "node.scores: int = 3",
        "for node.last_hidden in x: pass",
    ],
)
def test_write_of_a_field_is_seen(line):
    assert writes_of_node_fields(line)
