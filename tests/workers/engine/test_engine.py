"""The engine's promises: a row's answer is its own, tokens are computed once, and short memory costs time, not rows."""

import ctypes
import gc
import math
import random
import resource
from pathlib import Path

import pytest
import torch
from chains import chains
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import oracle_greedy, oracle_logits, oracle_model, tiny_model, tiny_tokenizer, tiny_tree_model

from segue.attention.segments import Segment, num_tokens
from segue.attention.tree.tree import SegmentTree
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.tree_model import tree_model
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import GenerationRequest

TOLERANCE = 1e-4
LONG = SamplingParams(max_tokens=40, ignore_eos=True)


def engine(**config):
    return Engine(tiny_tree_model(), EngineConfig(**{"mask": "segment", **config}))


def shared_prompts(num_rows=12, seed=0):
    """Rows over two systems, three documents and own questions of different lengths."""
    rng = random.Random(seed)
    systems = [Segment(tuple(rng.randrange(3, 250) for _ in range(30)), True) for _ in range(2)]
    documents = [Segment(tuple(rng.randrange(3, 250) for _ in range(20)), True) for _ in range(3)]
    rows = []
    for index in range(num_rows):
        question = Segment(tuple(rng.randrange(3, 250) for _ in range(rng.randrange(1, 15))), True)
        header = Segment((9, 8), False)
        rows.append([systems[index % 2], documents[index % 3], question, header])
    return rows


def token_ids(outputs):
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@given(rows=chains(max_rows=6), mask=st.sampled_from(["segment", "causal"]), budget=st.sampled_from([4, 7, 2048]))
@settings(deadline=None, max_examples=40)
def test_logits_of_random_trees_equal_transformers_whatever_the_step_budget(rows, mask, budget):
    got = engine(mask=mask, max_num_batched_tokens=budget, max_num_seqs=4).logits(rows)
    for row, logits in zip(rows, got, strict=True):
        chain = row if mask == "segment" else [Segment(segment.token_ids, False) for segment in row]
        torch.testing.assert_close(logits, oracle_logits(oracle_model(), chain)[-1], atol=TOLERANCE, rtol=0)


@given(rows=chains(max_rows=8), mask=st.sampled_from(["segment", "causal"]))
@settings(deadline=None, max_examples=40)
def test_tokens_computed_on_random_trees_equal_the_distinct_tokens(rows, mask):
    subject = engine(mask=mask)
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
    subject = engine()
    subject.generate(rows, SamplingParams(max_tokens=4))
    assert subject.stats.num_computed_tokens == 7 * (1 + 2 + 6 + 24)


def test_prompt_inside_a_longer_computed_run_computes_one_token_again():
    subject = engine(mask="causal")
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
    outputs = engine(**config).generate(rows, SamplingParams(max_tokens=24))
    for row, output in zip(rows, outputs, strict=True):
        wanted = oracle_greedy(oracle_model(), tuple(row), 24, tiny_tree_model().eos_token_ids)
        assert output.outputs[0].token_ids == wanted


@given(order=st.permutations(range(12)))
@settings(deadline=None, max_examples=10)
def test_sampled_answers_of_permuted_rows_are_permuted(order):
    params = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, n=2)
    rows = shared_prompts()
    keys = [f"row {i}".encode() for i in range(12)]
    wanted = run_with_keys(engine(), rows, keys, params)
    got = run_with_keys(engine(max_num_seqs=5), [rows[i] for i in order], [keys[i] for i in order], params)
    assert got == [wanted[i] for i in order]


def run_with_keys(subject, rows, keys, params):
    for index, (row, key) in enumerate(zip(rows, keys, strict=True)):
        subject.add(index, GenerationRequest(row, params, key))
    outputs = {}
    while subject.has_work:
        outputs.update((output.request_id, output) for output in subject.step())
    return token_ids([outputs[index] for index in range(len(rows))])


def test_answers_with_reference_backend_equal_those_with_cpu_backend():
    rows, params = shared_prompts(6), SamplingParams(max_tokens=20)
    assert token_ids(engine(backend="reference").generate(rows, params)) == token_ids(engine().generate(rows, params))


# -- memory


def test_kv_memory_too_short_for_all_rows_preempts_and_answers_all_alike():
    rows = shared_prompts(10)
    bytes_per_token = tiny_tree_model().kv_shape.bytes_per_token
    wanted = engine().generate(rows, LONG)
    tight = engine(kv_cache_memory_bytes=260 * bytes_per_token)
    got = tight.generate(rows, LONG)
    assert token_ids(got) == token_ids(wanted)
    assert tight.stats.num_preemptions > 0
    assert tight.stats.max_kv_bytes <= 260 * bytes_per_token


@given(budget=st.integers(150, 600), seed=st.integers(0, 5), max_num_seqs=st.sampled_from([2, 5, 64]))
@settings(deadline=None, max_examples=20)
def test_kv_memory_of_any_size_answers_each_row_or_names_the_limit(budget, seed, max_num_seqs):
    rows = shared_prompts(6, seed)
    bytes_per_token = tiny_tree_model().kv_shape.bytes_per_token
    tight = engine(kv_cache_memory_bytes=budget * bytes_per_token, max_num_seqs=max_num_seqs)
    wanted = token_ids(engine().generate(rows, LONG))
    for output, tokens in zip(tight.generate(rows, LONG), wanted, strict=True):
        if output.error is None:
            assert [sample.token_ids for sample in output.outputs] == tokens
        else:
            assert output.error.code == "ROW_OOM"
            assert f"{budget} tokens" in output.error.message
    assert tight.stats.max_kv_bytes <= budget * bytes_per_token


def test_row_that_can_never_fit_costs_only_itself():
    bytes_per_token = tiny_tree_model().kv_shape.bytes_per_token
    small = engine(kv_cache_memory_bytes=100 * bytes_per_token)
    rows = [[Segment((5, 6, 7), True)], [Segment(tuple([9] * 150), True)], [Segment((8, 9), True)]]
    outputs = small.generate(rows, SamplingParams(max_tokens=4))
    assert [output.error and str(output.error.code) for output in outputs] == [None, "ROW_OOM", None]
    assert token_ids(outputs)[0] == token_ids(engine().generate(rows[:1], SamplingParams(max_tokens=4)))[0]


def test_memory_is_all_given_back_after_rows_and_cache_are_gone():
    subject = engine(enable_prefix_caching=False)
    subject.generate(shared_prompts(), LONG)
    assert subject.cache.allocated_bytes == 0
    assert list(subject.tree) == []


def test_keys_of_rows_that_are_done_do_not_pile_up_but_what_rows_shared_stays(monkeypatch):
    """There is memory for the 2,000 own tokens, of which 50 are kept, and the 30 that all rows see."""
    monkeypatch.setattr("segue.attention.tree.cache.UNSHARED_TOKENS", 50)
    monkeypatch.setattr("segue.attention.tree.cache.UNSHARED_SHARE", 0.0)
    subject = engine(max_num_seqs=4)
    shared = Segment(tuple(range(10, 40)), True)
    rows = [[shared, Segment(tuple(range(index, index + 20)), True)] for index in range(100)]
    first = subject.generate(rows, SamplingParams(max_tokens=1))
    kept = subject.cache.allocated_bytes // subject.cache.shape.bytes_per_token
    assert 30 < kept <= 30 + 50
    assert {output.num_cached_tokens for output in first[4:]} == {30}
    again = subject.generate([rows[99], rows[0]], SamplingParams(max_tokens=1))
    assert [output.num_cached_tokens for output in again] == [50, 30]
    assert token_ids(again) == token_ids([first[99], first[0]])


def test_node_that_a_second_row_has_used_is_not_taken_for_one_of_a_single_row(monkeypatch):
    monkeypatch.setattr("segue.attention.tree.cache.UNSHARED_TOKENS", 25)
    monkeypatch.setattr("segue.attention.tree.cache.UNSHARED_SHARE", 0.0)
    subject = engine()
    pair, single = [Segment(tuple(range(20, 40)), True)], [[Segment((n,) * 20, True)] for n in range(50, 60)]
    for row in (pair, pair, *single):
        subject.generate([row], SamplingParams(max_tokens=1))
    assert subject.generate([pair], SamplingParams(max_tokens=1))[0].num_cached_tokens == 20


def test_kv_bytes_of_rows_over_a_shared_segment_are_exactly_the_distinct_tokens():
    """256 rows over 4,096 shared tokens: (4,096 + own) x bytes a token, and the process grows by no more."""
    own_model = tiny_model("llama", max_position_embeddings=8192, num_key_value_heads=6, num_hidden_layers=24)
    subject = Engine(
        tree_model(own_model, tiny_tokenizer()),
        EngineConfig(mask="segment", max_num_seqs=256, max_num_batched_tokens=8192),
    )
    shared = Segment(tuple(3 + i % 200 for i in range(4096)), True)
    rows = [[shared, Segment(tuple(3 + (i * 7 + j) % 200 for j in range(1 + i % 9)), True)] for i in range(256)]
    own = sum(len(tokens) for tokens in {row[1].token_ids for row in rows})
    assert len({row[1].token_ids for row in rows}) > 200
    subject.generate([[Segment((5,) * 4096, True)]], SamplingParams(max_tokens=1))  # warm up buffers of the same size
    subject.scheduler.residency.make_room(subject.cache.budget_bytes // subject.cache.shape.bytes_per_token)
    assert subject.cache.allocated_bytes == 0
    before = resident_bytes()
    for index, row in enumerate(rows):
        subject.add(index, GenerationRequest(row, SamplingParams(max_tokens=1), b""))
    while subject.has_work:
        subject.step()
    wanted = (4096 + own) * subject.cache.shape.bytes_per_token
    assert subject.cache.allocated_bytes == wanted
    grown = resident_bytes() - before
    # Measured: 1.03, less where files before this one left freed memory to the process; one copy a row would be 195.
    assert grown < 1.4 * wanted


def resident_bytes() -> int:
    """What the process holds now, after what it freed was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


# -- sampling, stopping, errors


def test_samples_of_a_row_share_its_prompt_and_differ():
    subject = engine()
    output = subject.generate(
        [[Segment(tuple(range(3, 50)), True)]], SamplingParams(n=4, temperature=1.5, max_tokens=12)
    )[0]
    assert subject.stats.num_computed_tokens == 47
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]


def test_seed_decides_the_draw():
    row, params = [[Segment((5, 6), True)]], SamplingParams(temperature=1.0, max_tokens=16)
    assert token_ids(engine(seed=1).generate(row, params)) == token_ids(engine(seed=1).generate(row, params))
    assert token_ids(engine(seed=1).generate(row, params)) != token_ids(engine(seed=2).generate(row, params))
    own = params.model_copy(update={"seed": 7})
    assert token_ids(engine(seed=1).generate(row, own)) == token_ids(engine(seed=2).generate(row, own))


def test_drawn_tokens_follow_the_model_distribution():
    """4,000 draws against the oracle's probabilities, chi-squared at 1 in 10^6."""
    row = [Segment((5, 6, 7), True)]
    params = SamplingParams(temperature=1.0, max_tokens=1, n=1000, ignore_eos=True)
    counts = torch.zeros(320)
    for seed in range(4):
        for sample in engine(seed=seed).generate([row], params)[0].outputs:
            counts[sample.token_ids[0]] += 1
    logits = oracle_logits(oracle_model(), row)[-1]
    expected = logits.softmax(-1) * counts.sum()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    chi2 = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 25


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 3}, 3),
        ({"top_k": 1}, 1),
        ({"min_p": 1.0}, 1),
        ({"top_p": 1e-6}, 1),
    ],
)
def test_truncated_sampling_draws_only_the_most_likely_tokens(params, allowed):
    row = [Segment((5, 6, 7), True)]
    sampled = SamplingParams(temperature=5.0, max_tokens=1, n=200, **params)
    drawn = {sample.token_ids[0] for sample in engine().generate([row], sampled)[0].outputs}
    best = oracle_logits(oracle_model(), row)[-1].topk(allowed).indices.tolist()
    assert drawn <= set(best)


def test_logprobs_equal_the_log_softmax_of_the_model():
    row = [Segment((5, 6, 7), True)]
    output = (
        engine()
        .generate([row], SamplingParams(max_tokens=3, logprobs=2, ignore_eos=True, temperature=0.7))[0]
        .outputs[0]
    )
    assert len(output.logprobs or []) == 3
    for index, token in enumerate(output.logprobs or []):
        wanted = oracle_logits(oracle_model(), row, tuple(output.token_ids[:index]))[-1].log_softmax(-1)
        assert token.token_id == output.token_ids[index]
        assert token.logprob == pytest.approx(float(wanted[token.token_id]), abs=TOLERANCE)
        assert [value for _, value in token.top] == pytest.approx(wanted.topk(2).values.tolist(), abs=TOLERANCE)


def test_repetition_penalty_forbids_what_it_makes_unlikely():
    row = [Segment((5, 6, 7), True)]
    output = engine().generate(
        [row], SamplingParams(max_tokens=30, ignore_eos=True, presence_penalty=2.0, repetition_penalty=1e6)
    )
    assert len(set(output[0].outputs[0].token_ids)) == 30


def test_min_tokens_holds_back_end_of_sequence():
    model = tree_model(tiny_model("llama"), tiny_tokenizer())
    first = Engine(model, EngineConfig(mask="segment")).generate(
        [[Segment((5, 6), True)]], SamplingParams(max_tokens=1)
    )
    model.eos_token_ids = frozenset({first[0].outputs[0].token_ids[0]})
    subject = Engine(model, EngineConfig(mask="segment"))
    stopped = subject.generate([[Segment((5, 6), True)]], SamplingParams(max_tokens=8))[0].outputs[0]
    assert (stopped.finish_reason, len(stopped.token_ids)) == ("stop", 1)
    held = subject.generate([[Segment((5, 6), True)]], SamplingParams(max_tokens=8, min_tokens=5))[0].outputs[0]
    assert len(held.token_ids) >= 5
    assert model.eos_token_ids.isdisjoint(held.token_ids[:5])


def test_stop_string_cuts_the_text_before_it():
    free = engine().generate([[Segment((70, 71), True)]], SamplingParams(max_tokens=30, ignore_eos=True))[0].outputs[0]
    stop = free.text[5:8]
    cut = (
        engine()
        .generate([[Segment((70, 71), True)]], SamplingParams(max_tokens=30, ignore_eos=True, stop=(stop,)))[0]
        .outputs[0]
    )
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]


def test_stop_token_ends_the_sample_and_is_named():
    free = engine().generate([[Segment((70, 71), True)]], SamplingParams(max_tokens=10, ignore_eos=True))[0].outputs[0]
    token = free.token_ids[4]
    params = SamplingParams(max_tokens=10, ignore_eos=True, stop_token_ids=(token,))
    cut = engine().generate([[Segment((70, 71), True)]], params)[0].outputs[0]
    assert cut.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", token)


def test_generation_that_reaches_the_context_ends_with_length():
    subject = engine(max_model_len=20)
    output = subject.generate([[Segment(tuple(range(3, 15)), True)]], SamplingParams(max_tokens=100, ignore_eos=True))[
        0
    ]
    assert len(output.outputs[0].token_ids) == 8
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(("segments", "code"), [([], "EMPTY_PROMPT"), ([Segment((5,) * 20, True)], "PROMPT_TOO_LONG")])
def test_prompt_that_cannot_run_is_a_row_error_beside_good_rows(segments, code):
    good = [Segment((5, 6), True)]
    outputs = engine(max_model_len=20).generate([good, segments, good], SamplingParams(max_tokens=2))
    assert [output.error and str(output.error.code) for output in outputs] == [None, code, None]


def test_row_with_nan_logits_fails_alone_and_its_neighbours_are_bit_equal():
    rows = shared_prompts(4)
    poison = 251
    rows_with_poison = [*rows[:2], [*rows[0][:2], Segment((poison,), True)], *rows[2:]]
    model = tree_model(tiny_model("llama"), tiny_tokenizer())
    with torch.no_grad():
        model.model.get_input_embeddings().weight[poison] = math.nan
    got = Engine(model, EngineConfig(mask="segment")).generate(rows_with_poison, SamplingParams(max_tokens=8))
    assert got[2].error is not None
    assert str(got[2].error.code) == "NUMERIC_ERROR"
    wanted = Engine(model, EngineConfig(mask="segment")).generate(rows, SamplingParams(max_tokens=8))
    assert token_ids([*got[:2], *got[3:]]) == token_ids(wanted)


def test_two_rows_in_one_batch_cannot_see_each_other():
    """Change one row's text: the other's logits stay bit-equal."""
    shared, own = Segment(tuple(range(3, 30)), True), Segment((40, 41), True)
    results = [engine().logits([[shared, own], [shared, Segment((50 + i, 60), True)]])[0] for i in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_generate_with_other_number_of_params_than_prompts_is_refused():
    with pytest.raises(ValueError, match="as many sampling params as prompts"):
        engine().generate([[Segment((5,), True)]], [SamplingParams(), SamplingParams()])


def test_slots_that_no_row_generates_in_are_counted():
    subject = engine(max_num_seqs=4)
    rows = [[Segment((number, 5), True)] for number in range(10, 13)]
    subject.generate(rows, [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 3, 5)])
    assert (subject.stats.num_decode_slots, subject.stats.num_empty_slots) == (16, 1 + 2 + 3 + 3)
