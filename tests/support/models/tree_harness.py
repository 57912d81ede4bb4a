"""Rows in a tree over any backend, checked against dense attention: prefill and decode, on random and on large trees.

A backend may say another `shape` and `tolerance` than fp32's.
"""

import itertools

import torch
from chains import chains
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from segue.attention.backend import LayerAttention
from segue.attention.memory.budget import KVShape
from segue.attention.memory.pool import KVPool
from segue.attention.reference import dense_attention
from segue.attention.segments import Segment, canonical_segments
from segue.attention.tree.blocks import DecodeQuery, blocks_of
from segue.attention.tree.cache import NodeCache
from segue.attention.visibility import block_sequence_ids, visible

H, HKV, D, SCALE = 4, 2, 8, 0.37
SHAPE = KVShape(1, HKV, D, torch.float32)
PLAIN = LayerAttention(SCALE)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LONG, SHORT = 80, 50  # tokens of a node


class Harness:
    """Rows in a tree, with the query, key and value of a token a fixed random function of what it can see."""

    def __init__(self, backend, rows, num_generated, how=PLAIN):
        self.rows, self.num_generated = rows, num_generated
        self.how = how
        self.shape = getattr(backend, "shape", SHAPE)
        self.tolerance = getattr(backend, "tolerance", TOLERANCE[self.shape.dtype])
        self.cache = backend.new_memory(self.shape, 1 << 22)
        self.tree = NodeCache(self.cache)
        self.backend = backend
        self.ends = [self.tree.insert(row) for row in rows]
        for end in self.ends:
            self.tree.add_row(end)
            self.tree.acquire(end)
        self.generator = torch.Generator().manual_seed(sum(len(row) for row in rows))
        self.node_qkv = {}

    def random_qkv(self, n):
        sizes = [(heads, n, self.shape.head_dim) for heads in (H, HKV, HKV)]
        return [torch.randn(size, generator=self.generator).to(self.shape.dtype) for size in sizes]

    def prefill(self, nodes):
        """One step over `nodes`; returns node -> output [n, H, D]."""
        blocks = blocks_of(nodes, [])
        for node in nodes:
            self.node_qkv[node] = self.random_qkv(len(node))
        packed = [torch.cat([self.node_qkv[b.node][i] for b in blocks.self_blocks], dim=1) for i in range(3)]
        run = self.backend.begin(blocks, (), self.cache)
        out = run.attend(0, packed[0], packed[1], packed[2], self.how)
        run.finish()
        for node in nodes:
            self.tree.keep_computed(node, None)
        return {b.node: out[b.start : b.stop] for b in blocks.self_blocks}

    def decode(self, tails, fed):
        """One token a row; returns outputs [B, H, D]."""
        for tail in tails:
            self.cache.grow_tail(tail)
        queries = [DecodeQuery(end, 1, end.stop + tail.length) for end, tail in zip(self.ends, tails, strict=True)]
        blocks = blocks_of([], queries)
        order = sorted(range(len(queries)), key=lambda i: blocks.decode_index[i])
        qkv = [self.random_qkv(1) for _ in queries]
        packed = [torch.cat([qkv[i][part] for i in order], dim=1) for part in range(3)]
        run = self.backend.begin(blocks, tails, self.cache)
        out = run.attend(0, packed[0], packed[1], packed[2], self.how)
        for i, tail in enumerate(tails):
            tail.length += 1
            fed[i].append(qkv[i])
        return torch.stack([out[index] for index in blocks.decode_index])

    def check_prefill(self, outputs):
        """Each row's tokens, put together from its nodes' `outputs`."""
        for index, end in enumerate(self.ends):
            got = torch.cat([outputs[node] for node in end.path()])
            torch.testing.assert_close(got.float(), self.expected(index, []), atol=self.tolerance, rtol=0)

    def check_decode(self, got, fed):
        """One decode step's outputs; `fed` holds what each row has generated."""
        for index in range(len(self.rows)):
            wanted = self.expected(index, fed[index])[-1]
            torch.testing.assert_close(got[index].float(), wanted, atol=self.tolerance, rtol=0)

    def expected(self, index, generated):
        """Dense attention of a whole row, [T, H, D]."""
        parts = [self.node_qkv[node] for node in self.ends[index].path()] + generated
        q, k, v = (torch.cat([part[i] for part in parts], dim=1) for i in range(3))
        mask = visible(block_sequence_ids(self.rows[index], len(generated)), self.how.window)
        return dense_attention(q, k, v, mask, self.how).float()


def check_random_trees(backend):
    """For tests of what a backend must not do."""

    @given(rows=chains(max_rows=6), cut=st.integers(0, 8), tails=st.lists(st.integers(0, 40), min_size=6, max_size=6))
    @settings(deadline=None, max_examples=30, derandomize=True, database=None, phases=[Phase.generate])
    def check(rows, cut, tails):
        check_tree(backend, rows, cut, tails)

    check()


def check_tree(backend, rows, cut, tails, how=PLAIN):
    """A prefill in two steps, then three steps of decoding."""
    harness = Harness(backend, rows, 0, how)
    nodes = list(harness.tree)
    outputs = {}
    for step_nodes in filter(None, (nodes[:cut], nodes[cut:])):  # depth-first: no child before its parent
        outputs.update(harness.prefill(step_nodes))
    harness.check_prefill(outputs)

    open_tails = [harness.cache.open_tail() for _ in rows]
    fed = [[] for _ in rows]
    for step in range(3):
        for tail, head_start in zip(open_tails, tails, strict=False):  # ragged tails, some of several pieces
            if step == 0:
                _prefeed(harness, tail, fed[open_tails.index(tail)], head_start)
        harness.check_decode(harness.decode(open_tails, fed), fed)


def check_long_nodes(backend, bidirectional, how=PLAIN):
    """Nodes that are batched and nodes that are not, under each other; a lineage too long to be gathered as one."""
    ids = itertools.count()

    def segment(length, kind=bidirectional):
        return Segment(tuple(next(ids) for _ in range(length)), kind)

    root, short = segment(LONG), segment(SHORT, True)
    deep = [segment(SHORT, True) for _ in range(7)]
    rows = [(root, short, segment(1 + n % 9), segment(3, True)) for n in range(40)]
    rows += [(root, short, *deep[:depth], segment(2)) for depth in range(1, 8)]
    rows += [(short, segment(LONG), segment(1)), (segment(1), segment(LONG, True))]
    rows = [canonical_segments(row, mask="segment") for row in rows]
    harness = Harness(backend, rows, 0, how)
    nodes = list(harness.tree)
    outputs = {}
    for step_nodes in (nodes[:60], nodes[60:]):  # depth-first: no child before its parent
        outputs.update(harness.prefill(step_nodes))
    harness.check_prefill(outputs)
    tails = [harness.cache.open_tail() for _ in rows]
    fed = [[] for _ in rows]
    harness.check_decode(harness.decode(tails, fed), fed)


def _prefeed(harness, tail, fed, count):
    """Give a tail some tokens already, as if generated in earlier steps."""
    for _ in range(count):
        harness.cache.grow_tail(tail)
        q, k, v = harness.random_qkv(1)
        if isinstance(harness.cache, KVPool):
            place = tail.start + tail.length
            harness.cache.tensors[0][0, place], harness.cache.tensors[0][1, place] = k[:, 0], v[:, 0]
        else:
            *_, (piece, used) = harness.cache.pieces(tail, tail.length + 1)
            piece.write(0, k, v, used - 1)
        tail.length += 1
        fed.append([q, k, v])
