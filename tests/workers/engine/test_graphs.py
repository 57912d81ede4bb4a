"""Padded steps of generating rows, which CUDA graphs replay; on a CPU they run without graphs."""

import pytest
from tiny_engines import kv_bytes, memory_of, over_backend, shared_prompts, tiny_engine, token_ids

from segue.attention.memory.pool import KVPool
from segue.workers.rows.params import SamplingParams


@pytest.fixture(autouse=True, scope="module")
def _over_varlen():
    with over_backend("varlen"):
        yield


@pytest.mark.parametrize(
    "sampling", [SamplingParams(max_tokens=20, ignore_eos=True), SamplingParams(max_tokens=9, n=3, temperature=0.9)]
)
def test_padded_decoding_gives_the_answers_of_exact_steps(sampling):
    prompts = shared_prompts(13)
    wanted = token_ids(tiny_engine().generate(prompts, sampling))
    engine = tiny_engine(decode_graphs=True, max_num_seqs=5)
    assert token_ids(engine.generate(prompts, sampling)) == wanted
    assert engine.core.runner.graphs is not None
    assert 0 < engine.core.runner.graphs.num_captures < engine.stats.num_steps


def test_padded_decoding_survives_a_pool_that_shrinks(monkeypatch):
    prompts, sampling = shared_prompts(6), SamplingParams(max_tokens=8, ignore_eos=True)
    wanted = token_ids(tiny_engine().generate(prompts, sampling))
    tokens = kv_bytes(800)
    engine = tiny_engine(decode_graphs=True, max_num_seqs=4, kv_cache_memory_bytes=tokens)
    steps = []
    plan_step = engine.core.scheduler.plan_step

    def shrinking():
        steps.append(None)
        if len(steps) == 5:
            assert engine.core.scheduler.shrink_memory(tokens // 2)
        return plan_step()

    monkeypatch.setattr(engine.core.scheduler, "plan_step", shrinking)
    assert token_ids(engine.generate(prompts, sampling)) == wanted
    pool = memory_of(engine)
    assert isinstance(pool, KVPool)
    assert pool.generation > 0
