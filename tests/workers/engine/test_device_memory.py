"""A device without memory for a step: steps become smaller, then the KV memory, and no answer changes."""

import pytest
import torch
from tiny_engines import kv_bytes, memory_of, over_backend, shared_prompts, tiny_engine, token_ids

from segue.attention.memory.pool import KVPool
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
