"""The engine's promises: a row's answer is its own, whatever else runs, and tokens are computed once."""

import pytest
import torch
from chains import chains
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engines import run_with_keys, shared_prompts, tiny_engine, token_ids
from tiny_models import oracle_greedy, oracle_logits, oracle_model, tiny_tree_model

from segue.attention.cpu.backend import NativeBackend
from segue.attention.cuda.backend import VarlenBackend
from segue.attention.segments import Segment, num_tokens
from segue.attention.tree.tree import SegmentTree
from segue.workers.devices.devices import cpu_kernels
from segue.workers.rows.params import SamplingParams

pytestmark = pytest.mark.usefixtures("each_backend")

TOLERANCE = 1e-4


def test_engine_runs_over_the_backend_that_is_meant(each_backend):
    backend = tiny_engine().core.runner.backend
    assert isinstance(backend, VarlenBackend) == (each_backend == "varlen")
    assert isinstance(backend, NativeBackend) == (each_backend == "kernels" and cpu_kernels() is not None)


@given(rows=chains(max_rows=6), mask=st.sampled_from(["segment", "causal"]), budget=st.sampled_from([4, 7, 2048]))
@settings(deadline=None, max_examples=40)
def test_logits_of_random_trees_equal_transformers_whatever_the_step_budget(rows, mask, budget):
    got = tiny_engine(mask=mask, max_num_batched_tokens=budget, max_num_seqs=4).logits(rows)
    for row, logits in zip(rows, got, strict=True):
        chain = row if mask == "segment" else [Segment(segment.token_ids, False) for segment in row]
        torch.testing.assert_close(logits, oracle_logits(oracle_model(), chain)[-1], atol=TOLERANCE, rtol=0)


@given(rows=chains(max_rows=8), mask=st.sampled_from(["segment", "causal"]))
@settings(deadline=None, max_examples=40)
def test_tokens_computed_on_random_trees_equal_the_distinct_tokens(rows, mask):
    subject = tiny_engine(mask=mask)
    outputs = subject.generate(rows, SamplingParams(max_tokens=2))
    tree = SegmentTree()
    for row in rows:
        tree.insert(row if mask == "segment" else [Segment(tuple(t for s in row for t in s.token_ids), False)])
    distinct = sum(len(node) for node in tree)
    assert subject.stats.num_computed_tokens == distinct
    assert sum(num_tokens(row) - o.num_cached_tokens for row, o in zip(rows, outputs, strict=True)) == distinct


def test_tokens_computed_with_four_levels_of_sharing_equal_the_distinct_tokens():
    levels = [[Segment(tuple(range(10 * i + 3, 10 * i + 10)), True) for i in range(k)] for k in (1, 2, 3, 4)]
    rows = [[a, b, c, d] for a in levels[0] for b in levels[1] for c in levels[2] for d in levels[3]]
    subject = tiny_engine()
    subject.generate(rows, SamplingParams(max_tokens=4))
    assert subject.stats.num_computed_tokens == 7 * (1 + 2 + 6 + 24)


def test_prompt_inside_a_longer_computed_run_computes_one_token_again():
    subject = tiny_engine(mask="causal")
    subject.generate([[Segment(tuple(range(3, 23)), False)]], SamplingParams(max_tokens=1))
    short = [[Segment(tuple(range(3, 13)), False)]]
    logits = subject.logits(short)[0]
    assert subject.stats.num_computed_tokens == 21
    torch.testing.assert_close(logits, oracle_logits(oracle_model(), short[0])[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "config", [{}, {"enable_prefix_caching": False}, {"max_num_seqs": 1}, {"max_num_batched_tokens": 64}]
)
def test_greedy_answers_equal_the_dense_loop_whatever_the_configuration(config):
    rows = shared_prompts()
    outputs = tiny_engine(**config).generate(rows, SamplingParams(max_tokens=24))
    for row, output in zip(rows, outputs, strict=True):
        wanted = oracle_greedy(oracle_model(), tuple(row), 24, tiny_tree_model().eos_token_ids)
        assert output.outputs[0].token_ids == wanted


@given(order=st.permutations(range(12)))
@settings(deadline=None, max_examples=10)
def test_sampled_answers_of_permuted_rows_are_permuted(order):
    params = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, n=2)
    rows = shared_prompts()
    keys = [f"row {i}".encode() for i in range(12)]
    wanted = run_with_keys(tiny_engine(), rows, keys, params)
    got = run_with_keys(tiny_engine(max_num_seqs=5), [rows[i] for i in order], [keys[i] for i in order], params)
    assert got == [wanted[i] for i in order]


def test_answers_with_reference_backend_equal_those_with_cpu_backend():
    rows, params = shared_prompts(6), SamplingParams(max_tokens=20)
    assert token_ids(tiny_engine(backend="reference").generate(rows, params)) == token_ids(
        tiny_engine().generate(rows, params)
    )
