"""A device without memory for a step: steps become smaller, then the KV memory, and no answer changes."""

import pytest
import torch
from tiny_engines import kv_bytes, memory_of, over_backend, shared_prompts, tiny_engine, token_ids

from segue.attention.memory import pool as pools
from segue.attention.memory.pool import KVPool
from segue.attention.segments import Segment
from segue.workers.engine import core as cores
from segue.workers.rows.params import SamplingParams


@pytest.fixture(autouse=True, scope="module")
def _over_varlen():
    with over_backend("varlen"):
        yield


def _failing_forward(model, monkeypatch, is_too_much):
    """Raises what torch raises when a device has no memory for a step."""
    forward = type(model).forward
    sizes = []

    def wrapped(self, blocks, run):
        sizes.append(blocks.num_tokens)
        if is_too_much(sizes):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(self, blocks, run)

    monkeypatch.setattr(type(model), "forward", wrapped)
    return sizes


def test_step_that_does_not_fit_on_the_device_is_tried_again_smaller_and_no_answer_changes(monkeypatch):
    prompts = shared_prompts()
    params = SamplingParams(max_tokens=6)
    wanted = token_ids(tiny_engine(max_num_seqs=4).generate(prompts, params))
    engine = tiny_engine(max_num_seqs=4)
    sizes = _failing_forward(engine.model, monkeypatch, lambda sizes: sizes[-1] > 60)
    assert token_ids(engine.generate(prompts, params)) == wanted
    assert engine.stats.num_shrunk_steps == sum(size > 60 for size in sizes) > 0


def test_steps_that_cannot_be_smaller_take_memory_from_the_pool(monkeypatch):
    prompts = shared_prompts()
    params = SamplingParams(max_tokens=6)
    wanted = token_ids(tiny_engine(max_num_seqs=4).generate(prompts, params))
    tokens = 600
    engine = tiny_engine(
        max_num_seqs=4,
        max_num_batched_tokens=4,
        kv_cache_memory_bytes=kv_bytes(tokens),
    )
    _failing_forward(engine.model, monkeypatch, lambda sizes: memory_of(engine).budget_tokens > 300)
    assert token_ids(engine.generate(prompts, params)) == wanted
    assert 200 < memory_of(engine).budget_tokens <= 300
    pool = memory_of(engine)
    assert isinstance(pool, KVPool)
    assert pool.tensors[0].shape[1] == pool.budget_tokens + 1


def test_rows_give_way_when_the_pool_becomes_too_small_for_them(monkeypatch):
    prompts, sampling = shared_prompts(6), SamplingParams(max_tokens=8, ignore_eos=True)
    wanted = token_ids(tiny_engine().generate(prompts, sampling))
    engine = tiny_engine(max_num_seqs=6, kv_cache_memory_bytes=kv_bytes(400))
    plan_step = engine.core.scheduler.plan_step

    def shrinking():
        if engine.stats.num_steps == 3:
            assert memory_of(engine).allocated_bytes > kv_bytes(180)
            assert engine.core.scheduler.shrink_memory(kv_bytes(180))
            assert memory_of(engine).allocated_bytes <= memory_of(engine).budget_bytes == kv_bytes(180)
        if engine.stats.num_steps == 5:
            assert not engine.core.scheduler.shrink_memory(kv_bytes(20))
            assert memory_of(engine).budget_tokens == 180
        return plan_step()

    monkeypatch.setattr(engine.core.scheduler, "plan_step", shrinking)
    assert token_ids(engine.generate(prompts, sampling)) == wanted
    assert engine.core.scheduler.num_preemptions > 0


def test_device_without_memory_for_anything_ends_the_engine(monkeypatch):
    engine = tiny_engine()
    _failing_forward(engine.model, monkeypatch, lambda sizes: True)
    with pytest.raises(torch.OutOfMemoryError, match=r"a step of .* tokens does not fit"):
        engine.generate(shared_prompts(), SamplingParams(max_tokens=2))


def test_limits_that_were_lowered_are_raised_again_after_good_steps(monkeypatch):
    monkeypatch.setattr("segue.workers.engine.scheduler.PATIENCE", 1)
    engine = tiny_engine(max_num_seqs=4, max_num_batched_tokens=64, kv_cache_memory_bytes=kv_bytes(600))
    _failing_forward(engine.model, monkeypatch, lambda sizes: len(sizes) < 10)
    engine.generate(shared_prompts(), SamplingParams(max_tokens=6))
    assert engine.stats.num_shrunk_steps == 9
    assert engine.core.scheduler.step_tokens == 64
    assert memory_of(engine).budget_tokens == 600


@pytest.mark.parametrize("most", [70, 100])
def test_segment_that_does_not_fit_on_the_device_costs_its_row_alone(most, monkeypatch):
    prompts, params = shared_prompts(6), SamplingParams(max_tokens=6)
    wanted = token_ids(tiny_engine().generate(prompts, params))
    engine = tiny_engine(max_num_seqs=4, kv_cache_memory_bytes=kv_bytes(400))
    _failing_forward(engine.model, monkeypatch, lambda sizes: sizes[-1] > most)
    long = [Segment(tuple(range(3, 4 + most)), True)]
    outputs = engine.generate([*prompts[:3], long, *prompts[3:]], params)
    assert [output.error and output.error.code for output in outputs] == [None] * 3 + ["ROW_OOM"] + [None] * 3
    assert f"a step of {most + 1} tokens" in str(outputs[3].error)
    assert token_ids([*outputs[:3], *outputs[4:]]) == wanted
    assert memory_of(engine).budget_tokens == 400


def test_segment_that_fits_on_the_device_without_other_rows_is_answered(monkeypatch):
    long, params = [Segment(tuple(range(251, 151, -1)), True)], SamplingParams(max_tokens=6, ignore_eos=True)
    prompts = [*shared_prompts(3), long]
    wanted = token_ids(tiny_engine().generate(prompts, params))
    engine = tiny_engine(max_num_seqs=4, max_num_batched_tokens=40)
    _failing_forward(engine.model, monkeypatch, lambda sizes: sizes[-1] > 100)
    assert token_ids(engine.generate(prompts, params)) == wanted
    assert engine.stats.num_shrunk_steps == 1


def test_segment_that_fits_beside_less_kv_memory_than_an_earlier_row_holds_waits_for_that_row(monkeypatch):
    first = [Segment(tuple(range(3, 60)), False)]
    long, params = [Segment(tuple(range(3, 83)), True)], SamplingParams(max_tokens=30, ignore_eos=True)
    wanted = token_ids(tiny_engine().generate([first, long], params))
    engine = tiny_engine(max_num_batched_tokens=64, kv_cache_memory_bytes=kv_bytes(200))
    memory = memory_of(engine)
    _failing_forward(engine.model, monkeypatch, lambda s: s[-1] >= 80 and memory.allocated_bytes > kv_bytes(120))
    assert token_ids(engine.generate([first, long], params)) == wanted


def test_row_that_needs_the_kv_memory_that_was_given_up_for_steps_gets_it_back(monkeypatch):
    row, params = [Segment(tuple(range(3, 50)), False)], SamplingParams(max_tokens=1)
    wanted = token_ids(tiny_engine().generate([row], params))
    engine = tiny_engine(max_num_seqs=1, max_num_batched_tokens=1, kv_cache_memory_bytes=kv_bytes(49))
    assert engine.core.scheduler.shrink_memory(kv_bytes(36))
    assert token_ids(engine.generate([row], params)) == wanted


def _failing(monkeypatch, room, name, is_too_much):
    function = getattr(room, name)

    def wrapped(*args, **kwargs):
        if is_too_much(*args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return function(*args, **kwargs)

    monkeypatch.setattr(room, name, wrapped)


def test_device_without_memory_for_drawing_so_many_tokens_draws_fewer_at_once(monkeypatch):
    prompts, params = shared_prompts(6), SamplingParams(max_tokens=6, ignore_eos=True, n=2, temperature=0.8)
    wanted = token_ids(tiny_engine().generate(prompts, params))
    engine = tiny_engine()
    _failing(monkeypatch, cores, "draw", lambda logits, samples: len(samples) > 4)
    assert token_ids(engine.generate(prompts, params)) == wanted
    assert engine.stats.num_shrunk_steps > 0


def test_device_without_memory_to_move_the_pool_costs_no_answer(monkeypatch):
    prompts, params = shared_prompts(10), SamplingParams(max_tokens=40, ignore_eos=True)
    wanted = token_ids(tiny_engine().generate(prompts, params))
    engine = tiny_engine(kv_cache_memory_bytes=kv_bytes(260))
    moves = []
    _failing(monkeypatch, pools, "_move", lambda *args: moves.append(args) or len(moves) in (1, 2, 5))
    assert token_ids(engine.generate(prompts, params)) == wanted
    assert len(moves) > 5
