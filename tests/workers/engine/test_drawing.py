"""What is drawn, when an answer ends, and which rows have an error instead."""

import math

import pytest
import torch
from tiny_engines import shared_prompts, tiny_engine, token_ids
from tiny_models import oracle_logits, oracle_model, tiny_model, tiny_tokenizer

from segue.attention.segments import Segment
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.tree_model import tree_model
from segue.workers.rows.params import SamplingParams
from segue.workers.sampling.vocabulary import summarise

pytestmark = pytest.mark.usefixtures("each_backend")

TOLERANCE = 1e-4


def test_samples_of_a_row_share_its_prompt_and_differ():
    subject = tiny_engine()
    output = subject.generate(
        [[Segment(tuple(range(3, 50)), True)]], SamplingParams(n=4, temperature=1.5, max_tokens=12)
    )[0]
    assert subject.stats.num_computed_tokens == 47
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]


def test_seed_decides_the_draw():
    row, params = [[Segment((5, 6), True)]], SamplingParams(temperature=1.0, max_tokens=16)
    assert token_ids(tiny_engine(seed=1).generate(row, params)) == token_ids(tiny_engine(seed=1).generate(row, params))
    assert token_ids(tiny_engine(seed=1).generate(row, params)) != token_ids(tiny_engine(seed=2).generate(row, params))
    own = params.model_copy(update={"seed": 7})
    assert token_ids(tiny_engine(seed=1).generate(row, own)) == token_ids(tiny_engine(seed=2).generate(row, own))


def test_rows_of_one_prompt_with_a_seed_of_their_own_draw_the_same():
    """As in vLLM. With the engine's seed, each row draws for itself."""
    rows = [[Segment((5, 6), True)]] * 3
    params = SamplingParams(temperature=1.0, max_tokens=16, seed=7, n=2)
    first, second, third = token_ids(tiny_engine(max_num_seqs=3).generate(rows, params))
    assert first == second == third
    assert first[0] != first[1]
    assert len({str(each) for each in token_ids(tiny_engine().generate(rows, SamplingParams(temperature=1.0)))}) == 3


def test_drawn_tokens_follow_the_model_distribution():
    """4,000 draws against the oracle's probabilities, chi-squared at 1 in 10^6."""
    row = [Segment((5, 6, 7), True)]
    params = SamplingParams(temperature=1.0, max_tokens=1, n=1000, ignore_eos=True)
    counts = torch.zeros(320)
    for seed in range(4):
        for sample in tiny_engine(seed=seed).generate([row], params)[0].outputs:
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
    drawn = {sample.token_ids[0] for sample in tiny_engine().generate([row], sampled)[0].outputs}
    best = oracle_logits(oracle_model(), row)[-1].topk(allowed).indices.tolist()
    assert drawn <= set(best)


def test_logprobs_equal_the_log_softmax_of_the_model():
    row = [Segment((5, 6, 7), True)]
    output = (
        tiny_engine()
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
    output = tiny_engine().generate(
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
    free = (
        tiny_engine()
        .generate([[Segment((70, 71), True)]], SamplingParams(max_tokens=30, ignore_eos=True))[0]
        .outputs[0]
    )
    stop = free.text[5:8]
    cut = (
        tiny_engine()
        .generate([[Segment((70, 71), True)]], SamplingParams(max_tokens=30, ignore_eos=True, stop=(stop,)))[0]
        .outputs[0]
    )
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]


def test_stop_token_ends_the_sample_and_is_named():
    free = (
        tiny_engine()
        .generate([[Segment((70, 71), True)]], SamplingParams(max_tokens=10, ignore_eos=True))[0]
        .outputs[0]
    )
    token = free.token_ids[4]
    params = SamplingParams(max_tokens=10, ignore_eos=True, stop_token_ids=(token,))
    cut = tiny_engine().generate([[Segment((70, 71), True)]], params)[0].outputs[0]
    assert cut.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", token)


def test_generation_that_reaches_the_context_ends_with_length():
    subject = tiny_engine(max_model_len=20)
    output = subject.generate([[Segment(tuple(range(3, 15)), True)]], SamplingParams(max_tokens=100, ignore_eos=True))[
        0
    ]
    assert len(output.outputs[0].token_ids) == 8
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(("segments", "code"), [([], "EMPTY_PROMPT"), ([Segment((5,) * 20, True)], "PROMPT_TOO_LONG")])
def test_prompt_that_cannot_run_is_a_row_error_beside_good_rows(segments, code):
    good = [Segment((5, 6), True)]
    outputs = tiny_engine(max_model_len=20).generate([good, segments, good], SamplingParams(max_tokens=2))
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
    results = [tiny_engine().logits([[shared, own], [shared, Segment((50 + i, 60), True)]])[0] for i in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_generate_with_other_number_of_params_than_prompts_is_refused():
    with pytest.raises(ValueError, match="as many sampling params as prompts"):
        tiny_engine().generate([[Segment((5,), True)]], [SamplingParams(), SamplingParams()])


def test_slots_that_no_row_generates_in_are_counted():
    subject = tiny_engine(max_num_seqs=4)
    rows = [[Segment((number, 5), True)] for number in range(10, 13)]
    subject.generate(rows, [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 3, 5)])
    assert (subject.stats.num_decode_slots, subject.stats.num_empty_slots) == (16, 1 + 2 + 3 + 3)


def test_summary_of_logits_is_that_of_all_rows():
    logits = torch.randn(40, 100).bfloat16()
    found = summarise(logits, with_totals=True)
    assert torch.equal(found.highest, logits.float().amax(-1))
    assert torch.equal(found.most_likely, logits.argmax(-1))
    torch.testing.assert_close(found.highest + found.log_totals, logits.float().logsumexp(-1))
    assert not len(summarise(logits).log_totals)
