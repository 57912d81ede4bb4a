"""Whatever a row's parameters are, it draws a token that they allow or has an error. Its neighbours draw as alone."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engines import tiny_engine, token_ids
from torch import Tensor

from segue.attention.segments import Segment
from segue.attention.tree.node import Node
from segue.workers.errors import RowError
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import GenerationRequest, ScoringRequest
from segue.workers.sampling.draw import draw
from segue.workers.sampling.sample import Request, Sample

VOCAB_SIZE = 7
EOS = frozenset({1, 9})  # one of them is none of the vocabulary
TOKENS = st.integers(0, VOCAB_SIZE - 1)
LARGEST = torch.finfo(torch.float32).max
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 5e-324, 1e-39, 1e-38, 1e-5, 0.01, 1.0, 1e30, 1e39, 1e308]),
        "top_k": st.sampled_from([-1, 0, 1, 2, VOCAB_SIZE, 2**31, 2**63, 2**200]),
        "top_p": st.sampled_from([5e-324, 1e-46, 1e-6, 0.5, 1 - 1e-16, 1.0]),
        "min_p": st.sampled_from([0.0, 5e-324, 1e-46, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([5e-324, 1e-46, 1e-39, 0.5, 1.0, 2.0, 1e39, 1e308]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 2.0]),
        "frequency_penalty": st.sampled_from([-2.0, 0.0, 5e-324, 2.0]),
        "min_tokens": st.sampled_from([0, 2, 2**63]),
        "stop_token_ids": st.lists(TOKENS, max_size=VOCAB_SIZE).map(tuple),
        "logit_bias": st.dictionaries(TOKENS, st.sampled_from([-1e308, -100.0, 1.0, 1e308]), max_size=3),
        "allowed_token_ids": st.lists(TOKENS, min_size=1, max_size=VOCAB_SIZE).map(tuple),
        "seed": st.sampled_from([-(2**63), -1, 0, 2**63 - 1]),
        "logprobs": st.sampled_from([0, 3, 20]),
    },
).map(lambda fields: SamplingParams.model_validate({"max_tokens": 2**70, **fields}))
LOGITS = st.lists(
    st.sampled_from([0.0, 1.0, -3.0, 80.0, -1e30, LARGEST, -LARGEST, -math.inf]),
    min_size=VOCAB_SIZE,
    max_size=VOCAB_SIZE,
)
BROKEN = st.sampled_from([[math.nan] * VOCAB_SIZE, [-math.inf] * VOCAB_SIZE, [math.inf, *[0.0] * (VOCAB_SIZE - 1)]])


def sample_of(params: SamplingParams, number: int, said: list[int]) -> Sample:
    prompt = (Segment((0, 3, 3), False),)
    request = Request(number, prompt, params, str(number).encode(), number, Node.__new__(Node))
    return Sample(request, 0, request.root, token_ids=said)


def drawn(logits: Tensor, samples: list[Sample]) -> list[Any]:
    results = draw(logits, samples, seed=3, eos_token_ids=EOS)
    return [str(each.code) if isinstance(each, RowError) else each for each in results]


@given(rows=st.lists(st.tuples(LOGITS | BROKEN, PARAMS, st.lists(TOKENS, max_size=4)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=300)
def test_rows_of_any_parameters_draw_what_they_draw_alone(rows):
    logits = torch.tensor([row[0] for row in rows], dtype=torch.float32)
    samples = [sample_of(params, number, said) for number, (_, params, said) in enumerate(rows)]
    together = drawn(logits, samples)
    alone = [drawn(logits[number : number + 1], [sample])[0] for number, sample in enumerate(samples)]
    assert together == alone
    for number, token in enumerate(together):
        if not math.isfinite(float(logits[number].max())):
            assert token == "NUMERIC_ERROR"
            continue
        params, said = samples[number].request.params, samples[number].token_ids
        banned = {*EOS, *params.stop_token_ids} if len(said) < params.min_tokens else set()
        allowed = {*range(VOCAB_SIZE)} if params.allowed_token_ids is None else {*params.allowed_token_ids}
        possible = {each for each in allowed - banned if math.isfinite(logits[number][each])}
        assert token in possible if possible else token == "BAD_PARAMS"


@pytest.mark.parametrize(("given_", "kept"), [(1e-39, 0.01), (5e-324, 0.01), (0.009, 0.01), (0.0, 0.0), (0.02, 0.02)])
def test_temperature_close_to_zero_is_a_hundredth(given_, kept):
    assert SamplingParams(temperature=given_).temperature == kept
    assert SamplingParams().with_row({"temperature": given_}).temperature == kept


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"logit_bias": {"5": math.nan}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": "5"}, "logit_bias"),
        ({"logit_bias": 5}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": "word"}, "bad_words"),
        ({"temperature": -1e-39}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
)
def test_parameters_that_mean_nothing_are_an_error_of_the_row(wrong, named):
    with pytest.raises(RowError, match=named) as caught:
        SamplingParams().with_row(wrong)
    assert str(caught.value.code) == "BAD_PARAMS"


@pytest.mark.parametrize(
    ("wrong", "code", "said"),
    [
        ({"stop_token_ids": (320,)}, "BAD_PARAMS", "stop_token_ids: wanted ids from 0 to 319"),
        ({"stop_token_ids": (5, 2**31 - 1), "min_tokens": 2}, "BAD_PARAMS", "from 0 to 319"),
        ({"allowed_token_ids": (5, 320)}, "BAD_PARAMS", "allowed_token_ids: wanted ids from 0 to 319"),
        ({"logit_bias": {"320": 1.0}}, "BAD_PARAMS", "logit_bias: wanted ids from 0 to 319"),
        ({"bad_words": ("\ud800",)}, "BAD_PARAMS", "bad_words"),
        ({"allowed_token_ids": (2,), "min_tokens": 2, "stop_token_ids": (2,)}, "BAD_PARAMS", "forbid every token"),
        ({"stop_token_ids": tuple(range(320)), "min_tokens": 2}, "BAD_PARAMS", "forbid every token"),
    ],
)
def test_row_whose_parameters_the_model_cannot_follow_fails_beside_good_rows(wrong, code, said):
    rows = [[Segment((5 + number, 6), True)] for number in range(3)]
    good = SamplingParams(max_tokens=4, temperature=1.0, seed=3)
    outputs = tiny_engine().generate(rows, [good, SamplingParams(max_tokens=4, **wrong), good])
    assert outputs[1].error is not None
    assert str(outputs[1].error.code) == code
    assert said in outputs[1].error.message
    assert token_ids([outputs[0], outputs[2]]) == token_ids(tiny_engine().generate([rows[0], rows[2]], good))


@pytest.mark.parametrize("foreign", [-1, 320, 2**40])
def test_tokens_that_the_model_does_not_have_are_an_error_of_their_row(foreign):
    engine = tiny_engine()
    engine.add("prompt", GenerationRequest([Segment((5, foreign), True)], SamplingParams(), b""))
    engine.add("context", ScoringRequest([Segment((5, foreign), True)], (5,)))
    engine.add("continuation", ScoringRequest([Segment((5,), True)], (5, foreign)))
    engine.add("good", GenerationRequest([Segment((5, 6), True)], SamplingParams(), b""))
    outputs = {}
    while engine.has_work:
        outputs |= {output.request_id: output.error and str(output.error.code) for output in engine.step()}
    assert outputs == {"prompt": "BAD_PROMPT", "context": "BAD_PROMPT", "continuation": "BAD_PROMPT", "good": None}
