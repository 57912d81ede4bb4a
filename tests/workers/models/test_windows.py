"""Models with sliding windows, capped scores and sinks against transformers, over prompts longer than windows."""

import functools

import pytest
import torch
from tiny_models import WINDOW, WINDOWED, oracle_greedy, oracle_logits, oracle_model, tiny_model, tiny_tree_model

from segue.attention.segments import Segment, canonical_segments
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.errors import ModelRefused
from segue.workers.models import support
from segue.workers.models.tree_model import tree_model
from segue.workers.rows.params import SamplingParams

TOLERANCE = 1e-4
CAPPED = "gemma2 windowed"
SYSTEM = Segment(tuple(range(3, 14)), True)
PROMPTS = [
    [SYSTEM, Segment(tuple(range(20, 31)), True), Segment((7, 8, 9), False)],
    [SYSTEM, Segment((40, 41), True), Segment(tuple(range(60, 73)), False), Segment(tuple(range(90, 100)), True)],
    [SYSTEM, Segment((40, 41), True), Segment((5,), False)],
    [Segment((1,), False), Segment((9, 8), True)],
]
STEPS = {
    "whole prompts": {},
    "pieces": {"max_num_batched_tokens": 4, "max_num_seqs": 3},
    "no reuse": {"enable_prefix_caching": False},
}


@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize("mask", ["causal", "segment"])
@pytest.mark.parametrize("steps", STEPS)
def test_logits_behind_the_window_equal_transformers(each_backend, kind, mask, steps):
    """Of a batch, of the same batch in another order with a warm cache, and of one row alone."""
    _skip_what_varlen_refuses(each_backend, kind)
    subject = Engine(tiny_tree_model(kind), EngineConfig(mask=mask, **STEPS[steps]))
    chains = [canonical_segments(prompt, mask=mask) for prompt in PROMPTS]
    wanted = torch.stack([oracle_logits(oracle_model(kind), chain)[-1] for chain in chains])
    for prompts, expected in ((PROMPTS, wanted), (PROMPTS[::-1], wanted.flip(0)), (PROMPTS[:1], wanted[:1])):
        torch.testing.assert_close(subject.logits(prompts), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize("mask", ["causal", "segment"])
def test_greedy_tokens_behind_the_window_equal_the_dense_loop(each_backend, kind, mask):
    """Answers are longer than the window, and than the first piece of a tail."""
    _skip_what_varlen_refuses(each_backend, kind)
    subject = Engine(tiny_tree_model(kind), EngineConfig(mask=mask))
    outputs = subject.generate(PROMPTS, SamplingParams(max_tokens=18, ignore_eos=True))
    assert outputs[1].outputs[0].token_ids == dense_tokens(kind, mask)


@functools.cache
def dense_tokens(kind, mask):
    return oracle_greedy(oracle_model(kind), canonical_segments(PROMPTS[1], mask=mask), 18, frozenset())


def _skip_what_varlen_refuses(backend, kind):
    if backend == "varlen" and kind == CAPPED:
        pytest.skip("the variable-length kernel caps no scores: refused by name, see below")


@pytest.mark.parametrize("kind", WINDOWED)
def test_window_changes_the_logits_of_every_kind(kind):
    """Guards the tests above: if windows did nothing, they would prove nothing."""
    chain = canonical_segments(PROMPTS[0], mask="causal")
    models = oracle_model(kind), tiny_model(kind, sliding_window=400)
    narrow, wide = (oracle_logits(model, chain)[-1] for model in models)
    assert (narrow - wide).abs().max() > 10 * TOLERANCE


def test_row_may_be_as_long_as_the_context_whatever_the_window():
    assert tiny_tree_model("mistral windowed").max_model_len == 512


def test_model_that_tells_its_attention_another_window_is_refused():
    model = tiny_model("olmo3 windowed")
    model.model.layers[2].self_attn.sliding_window = WINDOW + 1
    with pytest.raises(ModelRefused, match=f"layer 2 has a sliding window of {WINDOW + 1} tokens, .* says {WINDOW}"):
        tree_model(model, None)


def test_capped_scores_are_refused_on_gpus_before_weights_are_read():
    config = tiny_model("gemma2 windowed").config
    support.check_device(config, on_gpu=False)
    with pytest.raises(ModelRefused, match=r"'gemma2' .* on GPUs: .*attn_logit_softcapping"):
        support.check_device(config, on_gpu=True)
    support.check_device(tiny_model("gpt_oss windowed").config, on_gpu=True)
