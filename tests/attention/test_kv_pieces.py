"""Keys and values in pieces: what a tail holds is found again in order, and what is given back is counted back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_tree_model

from segue.attention.memory.budget import KVMemory, KVMemoryExceeded, KVShape
from segue.attention.memory.pieces import KVPieces
from segue.attention.memory.pool import KVPool
from segue.attention.segments import Segment
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.rows.params import SamplingParams

SHAPE = KVShape(2, 1, 3, torch.float32)


def memory(num_tokens: int) -> KVPieces:
    return KVPieces(SHAPE, num_tokens * SHAPE.bytes_per_token)


@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4), rounds=st.integers(0, 3))
def test_tails_hold_their_tokens_in_order_and_cost_what_they_have_room_for(lengths, rounds):
    subject = memory(2000)
    for _ in range(rounds + 1):  # places are not used twice
        tails = [subject.open_tail() for _ in lengths]
        for number, (tail, length) in enumerate(zip(tails, lengths, strict=True)):
            for token in range(length):
                subject.grow_tail(tail)
                *_, (piece, used) = subject.pieces(tail, tail.length + 1)
                assert piece.place(used - 1)[0] == piece.tensor[:, :, :, used - 1].data_ptr()
                piece.tensor[:, :, :, used - 1] = 1000 * number + token
                tail.length += 1
        for number, (tail, length) in enumerate(zip(tails, lengths, strict=True)):
            held = torch.cat([piece.tensor[:, :, :, :used] for piece, used in subject.pieces(tail, length)], dim=3)
            wanted = 1000 * number + torch.arange(length, dtype=torch.float32)
            assert torch.equal(held, wanted[:, None].expand(held.shape))
        assert subject.allocated_bytes == subject.bytes_for(sum(tail.capacity for tail in tails))
        assert all(tail.capacity < 2 * max(length, 16) for tail, length in zip(tails, lengths, strict=True))
        for tail in tails:
            subject.close_tail(tail)
        assert subject.allocated_bytes == 0


def test_what_does_not_fit_is_refused_and_nothing_is_counted():
    subject = memory(40)
    node, tail = subject.allocate_node(20), subject.open_tail()
    tail.length = 16
    for refused in (lambda: subject.grow_tail(tail), subject.open_tail, lambda: subject.allocate_node(5)):
        with pytest.raises(KVMemoryExceeded):
            refused()
    assert (subject.allocated_bytes, tail.capacity) == (subject.bytes_for(36), 16)
    assert [used for _, used in subject.pieces(tail, 16)] == [16]
    subject.free_node(node)
    subject.grow_tail(tail)
    assert (subject.allocated_bytes, tail.capacity) == (subject.bytes_for(32), 32)


@pytest.mark.parametrize(("kind", "wanted"), [(KVPieces, 16), (KVPool, 32)])
@pytest.mark.parametrize("is_short", [False, True])
def test_tail_grows_in_as_many_tokens_as_it_says_and_in_no_fewer(kind: type[KVMemory], wanted, is_short):
    """Pieces grow in place; in a pool the old tail and its copy are there together."""
    subject = kind(SHAPE, (16 + wanted - is_short) * SHAPE.bytes_per_token)
    tail = subject.open_tail()
    assert subject.num_tokens_to_grow(tail) == 0
    tail.length = 16
    assert subject.num_tokens_to_grow(tail) == wanted
    assert subject.has_room(wanted) != is_short
    if is_short:
        with pytest.raises(KVMemoryExceeded):
            subject.grow_tail(tail)
    else:
        subject.grow_tail(tail)
    capacity = 16 if is_short else 32
    assert (tail.capacity, subject.allocated_bytes) == (capacity, subject.bytes_for(capacity))


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize(("num_tokens", "code"), [(49, None), (48, "ROW_OOM")])
def test_row_whose_tail_grows_in_place_fits_into_exactly_what_it_holds(backend, num_tokens, code):
    """20 tokens of a prompt and 29 that are fed after it, in a tail of 16 that then grows to just that."""
    model = tiny_tree_model()
    budget = num_tokens * model.kv_shape.bytes_per_token
    subject = Engine(model, EngineConfig(backend=backend, kv_cache_memory_bytes=budget))
    prompt = [Segment(tuple(range(3, 23)), False)]
    (output,) = subject.generate([prompt], SamplingParams(max_tokens=30, ignore_eos=True))
    assert (output.error and str(output.error.code)) == code
