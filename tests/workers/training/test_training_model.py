"""Training sees what serving sees: logits, masks and gradients against the dense reference."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, WINDOWED, oracle_logits, oracle_model, tiny_model, tiny_tokenizer

from segue.attention.segments import Segment, canonical_segments
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.errors import ModelRefused
from segue.workers.models.tree_model import tree_model
from segue.workers.training import model as training_model
from segue.workers.training.batches import TrainingExample
from segue.workers.training.model import TrainingModel, check_trainable
from segue.workers.training.params import LoraParams

TOLERANCE = 1e-4
FUSED = {"phi3": "qkv_proj", "gpt_neox": "query_key_value"}


def lora(kind="llama", **changes):
    names = (FUSED[kind],) if kind in FUSED else ("q_proj", "v_proj")
    return LoraParams(**{"r": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": names, **changes})


@functools.cache
def new_model():
    """Its adapters change nothing yet."""
    return TrainingModel(tiny_model("llama"), lora(), seed=0)


def trained_model(kind="llama", **changes):
    """With adapters that change something, as after a training."""
    model = TrainingModel(tiny_model(kind), lora(kind, **changes), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.trainable.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    model.train(False)
    return model


def wanted_logprobs(model, example):
    logits = oracle_logits(model, example.segments, example.answer[:-1])
    start = logits.shape[0] - len(example.answer)
    return logits.log_softmax(-1)[start:][range(len(example.answer)), list(example.answer)]


tokens = st.lists(st.integers(3, 300), min_size=1, max_size=9).map(tuple)
segments = st.lists(st.builds(Segment, tokens, st.booleans()), min_size=1, max_size=4)
examples = st.builds(
    lambda chain, answer, mask: TrainingExample(canonical_segments(chain, mask=mask), answer),
    segments,
    tokens,
    st.sampled_from(["segment", "causal"]),
)
EXAMPLE = TrainingExample((Segment(tuple(range(5, 20)), True), Segment((30, 31), False)), (40, 41, 42, 43, 2))
OTHER = TrainingExample((Segment((9, 8, 7), False), Segment((6, 5), True)), (50, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_of_a_padded_batch_equal_transformers_under_the_dense_mask(kind):
    model = TrainingModel(tiny_model(kind), lora(kind), seed=0)
    with torch.no_grad():
        got = model.logprobs([EXAMPLE, OTHER])
    wanted = torch.cat([wanted_logprobs(oracle_model(kind), example) for example in (EXAMPLE, OTHER)])
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)


UNTRAINABLE = ("gemma2 windowed", "gpt_oss windowed")


@pytest.mark.parametrize("kind", [kind for kind in WINDOWED if kind not in UNTRAINABLE])
@pytest.mark.parametrize("mask", ["segment", "causal"])
def test_logprobs_behind_sliding_windows_equal_transformers(kind, mask):
    examples = [TrainingExample(canonical_segments(e.segments, mask=mask), e.answer) for e in (EXAMPLE, OTHER)]
    model = TrainingModel(tiny_model(kind), LoraParams(target_modules="all-linear"), seed=0)
    with torch.no_grad():
        got = model.logprobs(examples)
    wanted = torch.cat([wanted_logprobs(oracle_model(kind), example) for example in examples])
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", UNTRAINABLE)
def test_models_that_cap_scores_or_have_sinks_are_refused_by_name(kind):
    with pytest.raises(ModelRefused, match=r"caps its scores or has attention sinks"):
        TrainingModel(tiny_model(kind), LoraParams(target_modules=("q_proj",)), seed=0)


def test_long_rows_of_a_batch_change_no_short_one():
    """EXAMPLE has 21 tokens to feed, and is long; OTHER is short."""
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 9.0], "factor": 4.0}
    changes = {
        "original_max_position_embeddings": 12,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12, **factors
        },
    }  # fmt: skip
    model = TrainingModel(tiny_model("phi3", **changes), LoraParams(target_modules="all-linear"), seed=0)
    with torch.no_grad():
        got = model.logprobs([EXAMPLE, OTHER])
    wanted = torch.cat([wanted_logprobs(tiny_model("phi3", **changes), example) for example in (EXAMPLE, OTHER)])
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)


@given(batch=st.lists(examples, min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
def test_logprobs_of_random_batches_equal_transformers_under_the_dense_mask(batch):
    model = new_model()
    with torch.no_grad():
        got = model.logprobs(batch)
    wanted = torch.cat([wanted_logprobs(oracle_model(), example) for example in batch])
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mask", ["segment", "causal"])
def test_training_and_serving_with_the_saved_adapter_give_equal_logprobs(tmp_path, mask):
    from peft import PeftModel

    model = trained_model()
    model.save_adapter(tmp_path, base_model="tiny")
    served = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path)).merge_and_unload()  # as load_model does
    engine = Engine(tree_model(served, tiny_tokenizer()), EngineConfig(mask=mask))
    example = TrainingExample(canonical_segments(EXAMPLE.segments, mask=mask), EXAMPLE.answer)
    with torch.no_grad():
        trained = float(model.logprobs([example, OTHER])[: len(example.answer)].sum())
    (score,) = engine.loglikelihood([(example.segments, example.answer)])
    assert score.logprob == pytest.approx(trained, abs=TOLERANCE * len(example.answer))


def test_loss_of_an_answer_token_does_not_change_with_later_ones():
    model = trained_model()
    changed = TrainingExample(EXAMPLE.segments, (*EXAMPLE.answer[:2], 77, 78, 79))
    with torch.no_grad():
        first, second = model.logprobs([EXAMPLE]), model.logprobs([changed])
    assert torch.equal(first[:2], second[:2])
    assert not torch.allclose(first[3:], second[3:])


def test_loss_changes_with_a_later_token_of_the_same_bidirectional_segment():
    """The other way round: what the mask lets through is there."""
    model = trained_model()
    prompt = EXAMPLE.segments[0].token_ids
    changed = TrainingExample((Segment((*prompt[:-1], 99), True), EXAMPLE.segments[1]), EXAMPLE.answer)
    with torch.no_grad():
        assert not torch.allclose(model.logprobs([EXAMPLE])[0], model.logprobs([changed])[0])


def test_gradients_equal_those_of_transformers_under_the_dense_mask():
    from peft import get_peft_model_state_dict

    model = trained_model()
    (-model.logprobs([EXAMPLE, OTHER]).sum()).backward()
    reference = trained_model()
    reference.peft.get_base_model().set_attn_implementation("eager")
    total = torch.zeros(())
    with torch.enable_grad():
        for example in (EXAMPLE, OTHER):
            total = total - dense_logprobs(reference, example).sum()
    total.backward()
    assert get_peft_model_state_dict(model.peft).keys()
    for name, parameter in model.trainable.items():
        wanted = reference.trainable[name].grad
        assert wanted is not None, name
        assert float(wanted.abs().max()) > 0, name
        torch.testing.assert_close(parameter.grad, wanted, atol=TOLERANCE, rtol=1e-3)


def dense_logprobs(model, example):
    """By the model's own eager attention under an additive mask."""
    from segue.attention.visibility import block_sequence_ids, visible

    fed = [token for segment in example.segments for token in segment.token_ids] + list(example.answer[:-1])
    mask = visible(block_sequence_ids(example.segments, len(example.answer) - 1))
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
    logits = model.peft.get_base_model()(input_ids=torch.tensor([fed]), attention_mask=bias, use_cache=False).logits[0]
    start = len(fed) - len(example.answer)
    return logits[start:].log_softmax(-1)[range(len(example.answer)), list(example.answer)]


def test_loss_and_gradients_are_the_same_whatever_the_size_of_logit_chunks(monkeypatch):
    whole, pieces = trained_model(), trained_model()
    first = whole.logprobs([EXAMPLE, OTHER])
    first.sum().backward()
    monkeypatch.setattr(training_model, "MAX_LOGITS", 640)  # two positions at a time
    second = pieces.logprobs([EXAMPLE, OTHER])
    second.sum().backward()
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    for name, parameter in whole.trainable.items():
        torch.testing.assert_close(parameter.grad, pieces.trainable[name].grad, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_computes_layers_twice_and_changes_no_gradient():
    plain, saving = trained_model(dropout=0.3), trained_model(dropout=0.3)
    saving.use_gradient_checkpointing()
    counts = []
    for model in (plain, saving):
        calls = []
        layer = model.peft.get_base_model().model.layers[1]
        layer.input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.train(True)
        torch.manual_seed(5)
        model.logprobs([EXAMPLE, OTHER]).sum().backward()
        counts.append(len(calls))
    assert counts == [1, 2]
    for name, parameter in plain.trainable.items():
        torch.testing.assert_close(parameter.grad, saving.trainable[name].grad, atol=1e-6, rtol=1e-4)


def test_short_rows_are_attended_like_long_ones(monkeypatch):
    query, key, value = (torch.randn(2, heads, 24, 16, requires_grad=True) for heads in (6, 2, 2))
    may_see = torch.rand(2, 1, 24, 24).round().bool() | torch.eye(24, dtype=torch.bool)
    module = torch.nn.Identity()
    for bias in (None, torch.zeros(2, 1, 24, 24).masked_fill(~may_see, -torch.inf)):
        found = []
        for limit in (0, 24):
            monkeypatch.setattr(training_model, "SHORT_TOKENS", limit)
            mask = training_model.TrainingMask(bias)
            out, _ = training_model.training_attention(module, query, key, value, None, 0.3, mask)
            found.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_new_adapters_change_nothing_and_only_they_are_trained():
    model = TrainingModel(tiny_model("llama"), lora(), seed=0)
    assert all("lora_" in name for name in model.trainable)
    assert len(model.trainable) == 3 * 2 * 2  # layers, modules, A and B
    with torch.no_grad():
        logprobs = model.logprobs([EXAMPLE])
    assert math.isfinite(float(logprobs.sum()))
    torch.testing.assert_close(logprobs, wanted_logprobs(oracle_model(), EXAMPLE), atol=TOLERANCE, rtol=0)


def test_module_that_the_model_lacks_is_refused_by_name():
    with pytest.raises(ModelRefused, match=r"no linear layer 'k_projection'; it has .*q_proj"):
        TrainingModel(tiny_model("llama"), lora(target_modules=("q_proj", "k_projection")), seed=0)


def test_all_linear_is_every_linear_layer_but_the_head():
    trainable = TrainingModel(tiny_model("llama"), lora(target_modules="all-linear"), seed=0).trainable
    names = {name.partition(".lora_")[0].rpartition(".")[2] for name in trainable}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_answers_that_generation_would_not_stop_after_are_refused(model_directory):
    check_trainable(model_directory, None, lora(), 2)
    check_trainable(model_directory, None, lora(), 257)  # the tokenizer's own
    with pytest.raises(ModelRefused, match=r"end with token 77.*stops at 2, 257"):
        check_trainable(model_directory, None, lora(), 77)
    with pytest.raises(ModelRefused, match="no linear layer 'k_projection'"):
        check_trainable(model_directory, None, lora(target_modules=("k_projection",)), 2)


def test_head_that_is_the_embedding_too_is_refused():
    assert TrainingModel(tiny_model("llama"), lora(target_modules=("lm_head",)), seed=0).trainable
    with pytest.raises(ModelRefused, match="no linear layer 'lm_head'"):
        TrainingModel(tiny_model("llama", tie_word_embeddings=True), lora(target_modules=("lm_head",)), seed=0)
