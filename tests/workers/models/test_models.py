"""Logits of every supported kind of model, over the tree, against transformers' own model under the mask of
`create_causal_mask(block_sequence_ids=...)`; and the kinds that are refused, by name."""

import copy
import os
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import (
    KINDS,
    PROMPTS,
    oracle_greedy,
    oracle_logits,
    oracle_model,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    tiny_tree_model,
)
from transformers import AutoModelForCausalLM

from segue.attention.cpu.kernels import Kernels
from segue.attention.segments import Segment
from segue.workers.devices.devices import cpu_kernels, cpu_multiplies_bf16
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.errors import ModelRefused
from segue.workers.models import support
from segue.workers.models.fused_cpu import FusedDecoder
from segue.workers.models.tree_model import tree_model
from segue.workers.models.weights_cpu import OneDnnProduct, OneDnnWeights, PlainWeights, TiledWeights
from segue.workers.rows.params import SamplingParams

TOLERANCE = 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_supported_model_equal_transformers_under_segment_mask(kind):
    engine = Engine(tiny_tree_model(kind), EngineConfig(mask="segment"))
    wanted = torch.stack([oracle_logits(oracle_model(kind), prompt)[-1] for prompt in PROMPTS])
    torch.testing.assert_close(engine.logits(PROMPTS), wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_segment_mask_changes_the_logits_of_every_supported_model(kind):
    """Guards the test above: if the mask did nothing, it would prove nothing."""
    segment = Engine(tiny_tree_model(kind), EngineConfig(mask="segment")).logits(PROMPTS)
    causal = Engine(tiny_tree_model(kind), EngineConfig(mask="causal")).logits(PROMPTS)
    assert (segment - causal).abs().amax(dim=-1).min() > 100 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_of_supported_model_equal_transformers_generate(kind):
    model, prompt = oracle_model(kind), [3, 17, 29, 40, 51, 62]
    engine = Engine(tiny_tree_model(kind), EngineConfig(mask="causal"))
    ids = torch.tensor([prompt])
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    got = engine.generate([[Segment(tuple(prompt), False)]], params)[0].outputs[0].token_ids
    assert got == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gemma"])
def test_greedy_tokens_under_segment_mask_equal_dense_loop(kind):
    engine = Engine(tiny_tree_model(kind), EngineConfig(mask="segment"))
    outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=20))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        wanted = oracle_greedy(oracle_model(kind), tuple(prompt), 20, engine.model.eos_token_ids)
        assert output.outputs[0].token_ids == wanted


def test_later_segment_changes_nothing_before_it():
    """A segment's keys depend on nothing after its own end: the second user turn does not change the first."""
    engine = Engine(tiny_tree_model(), EngineConfig(mask="segment"))
    first = [Segment((5, 6, 7), True)]
    alone = engine.logits([first])[0]
    within = oracle_logits(oracle_model(), [*first, Segment((8, 9, 10), True)])[2]
    torch.testing.assert_close(alone, within, atol=TOLERANCE, rtol=0)


REFUSED = {
    "mamba": ("keep a state", {"state_size": 8, "num_attention_heads": 6}),
    "bloom": ("AttentionInterface", {"n_head": 6, "n_layer": 2}),
    "deepseek_v3": ("compressed keys and values", {"n_routed_experts": 4}),
    "longcat_flash": ("compressed keys and values", {}),
    "minicpm3": ("compressed keys and values", {}),
    "gemma4_text": ("layers differ in head_dim", {"num_hidden_layers": 6}),
    "gemma3_text": ("both directions", {"use_bidirectional_attention": True}),
    "llama4_text": ("chunked_attention", {"num_local_experts": 2}),
    "falcon": ("AttentionInterface", {"alibi": True}),
    "t5": ("encoder-decoder", {}),
    "qwen3_next": ("linear_attention", {"head_dim": 16}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_model_the_tree_cannot_express_is_refused_by_name_and_reason(kind):
    reason, changes = REFUSED[kind]
    with pytest.raises(ModelRefused, match=rf"'{kind}'.*{reason}"):
        support.check_supported(tiny_config(kind, **changes))


def test_model_whose_attention_differs_from_what_its_configuration_says_is_caught_by_the_probe():
    model = tiny_model("llama")
    original = model.model.layers[1].self_attn.forward

    def biased(*args, **kwargs):
        out, weights = original(*args, **kwargs)
        is_eager = model.config._attn_implementation == "eager"
        return (out * 1.5 if is_eager else out), weights

    model.model.layers[1].self_attn.forward = biased
    with pytest.raises(ModelRefused, match="logits differ"):
        tree_model(model, None)


@pytest.mark.parametrize("kernels", ["0", "1"])
def test_configuration_with_other_key_heads_than_the_model_is_refused_and_no_memory_is_torn(kernels, monkeypatch):
    monkeypatch.setenv("SEGUE_CPU_KERNELS", kernels)
    with pytest.raises(ModelRefused, match=r"'gpt_neox'.*wanted keys and values"):
        tree_model(tiny_model("gpt_neox", num_attention_heads=4, num_key_value_heads=2), None)


def test_every_kind_in_the_tests_is_known_to_transformers():
    assert all(type(tiny_config(kind)) in AutoModelForCausalLM._model_mapping for kind in KINDS)


@pytest.mark.parametrize("kernels", ["0", "1"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_decoder_is_there_for_llama_like_models_and_equals_the_plain_one(kind, kernels, monkeypatch):
    monkeypatch.setenv("SEGUE_CPU_KERNELS", kernels)
    model = tree_model(tiny_model(kind, attention_bias=True) if kind == "llama" else tiny_model(kind), tiny_tokenizer())
    assert (model.fused is not None) == (kind in {"llama", "mistral", "qwen2", "qwen3"})
    fused = Engine(model, EngineConfig(mask="segment")).logits(PROMPTS)
    model.fused = None
    torch.testing.assert_close(fused, Engine(model, EngineConfig(mask="segment")).logits(PROMPTS), atol=1e-5, rtol=0)


WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4}  # enough for tiles


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packing", ["tiles", "onednn bf16", "onednn fp32"])
def test_packed_weights_compute_what_the_plain_ones_do(bias, packing):
    """With large weights, so that every part counts. oneDNN packs fp32 on every processor."""
    dtype, packed = _packing(packing)
    torch.manual_seed(0)
    layer = tiny_model("llama", attention_bias=bias, mlp_bias=bias, **WIDE).model.layers[0].to(dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=1.0 if name.endswith("bias") else parameter.shape[-1] ** -0.5)
    residual = torch.randn(37, 64).to(dtype)
    for name in ("qkv", "output", "mlp"):
        hidden = torch.randn(37, layer.self_attn.o_proj.in_features if name == "output" else 64).to(dtype)
        inputs = (hidden,) if name == "qkv" else (hidden, residual)
        got, wanted = (getattr(kind(layer), name)(*inputs).float() for kind in (packed, PlainWeights))
        assert (got - wanted).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * wanted.norm()
        assert wanted.norm() > 0.5 * residual.norm()


def test_probe_of_bf16_says_whether_onednn_packs_it():
    layer = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    if cpu_multiplies_bf16():
        OneDnnProduct([layer])
    else:
        with pytest.raises(RuntimeError, match="bf16"):
            OneDnnProduct([layer])


@pytest.mark.parametrize("has_bf16", [True, False])
def test_small_models_in_bf16_are_packed_where_the_processor_multiplies_it_with_the_same_logits(has_bf16, monkeypatch):
    if has_bf16 and not cpu_multiplies_bf16():
        pytest.skip("this processor does not multiply bf16")
    monkeypatch.setattr("segue.workers.models.fused_cpu.cpu_multiplies_bf16", lambda: has_bf16)
    model = tree_model(tiny_model("llama").bfloat16(), tiny_tokenizer())
    assert model.fused is not None
    assert isinstance(model.fused.head, OneDnnProduct) == has_bf16
    got = Engine(model, EngineConfig(mask="segment")).logits(PROMPTS)
    model.fused = None
    wanted = Engine(model, EngineConfig(mask="segment")).logits(PROMPTS)
    assert (got - wanted).norm() < 2e-2 * wanted.norm()


@pytest.mark.parametrize("mask", ["segment", "causal"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {}),
    ],
)
def test_all_layers_in_one_call_are_the_layers_one_by_one(kind, changes, mask):
    """And in bf16 no further from fp32 than transformers' modules over the tree are, with the same weights."""
    _tiles()
    own_model = tiny_model(kind, **WIDE, **changes).bfloat16()
    with torch.no_grad():
        for parameter in own_model.parameters():
            if parameter.dim() == 1:  # norms, all ones, and biases, all zeros
                parameter.add_(0.5 * torch.rand(parameter.shape).to(parameter))
    prompts = [*PROMPTS, [Segment(tuple(range(5, 205)), True), Segment((7, 8), True)]]  # with a block that is large
    exact = Engine(tree_model(copy.deepcopy(own_model).float(), tiny_tokenizer()), EngineConfig(mask=mask)).logits(
        prompts
    )
    model = tree_model(own_model, tiny_tokenizer())
    assert model.fused is not None
    assert model.fused._whole is not None
    whole = Engine(model, EngineConfig(mask=mask)).logits(prompts)
    model.fused._whole = None
    by_layers = Engine(model, EngineConfig(mask=mask)).logits(prompts)
    assert (whole - by_layers).norm() <= 1e-2 * by_layers.norm()
    model.fused = None
    plain = Engine(model, EngineConfig(mask=mask)).logits(prompts)
    assert (plain - exact).norm() < 0.1 * exact.norm()
    assert (whole - exact).norm() < 1.25 * (plain - exact).norm()


def test_any_number_of_threads_computes_the_same_numbers():
    """Also more than there are processors, where most of a team wait for others that are not running."""
    _tiles()
    model = tree_model(tiny_model("llama", **WIDE).bfloat16(), tiny_tokenizer())
    assert model.fused is not None
    assert model.fused._whole is not None
    prompts = [*PROMPTS, [Segment(tuple(range(5, 205)), True), Segment((7, 8), True)]]
    before = torch.get_num_threads()
    found = []
    try:
        for num_threads in (1, 2, 3, 3 * (os.cpu_count() or 1)):
            torch.set_num_threads(num_threads)
            found += [Engine(model, EngineConfig(mask="segment")).logits(prompts) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_decoder_whose_blocks_only_torch_attends_to_goes_layer_by_layer(monkeypatch):
    """Heads that no tile multiplies, in a model that tiles do."""
    _tiles()
    model = tree_model(tiny_model("llama", **WIDE | {"head_dim": 48}).bfloat16(), tiny_tokenizer())
    assert model.fused is not None
    assert model.fused._whole is not None
    prompts = [*PROMPTS, [Segment(tuple(range(5, 205)), True), Segment((7, 8), True)]]
    got = Engine(model, EngineConfig(mask="segment")).logits(prompts)
    model.fused = None
    plain = Engine(model, EngineConfig(mask="segment")).logits(prompts)
    assert (got - plain).norm() < 3e-2 * plain.norm()


def _packing(name: str) -> tuple[torch.dtype, Any]:
    if name == "tiles":
        return torch.bfloat16, partial(TiledWeights, kernels=_tiles())
    if name == "onednn bf16" and not cpu_multiplies_bf16():
        pytest.skip("this processor does not multiply bf16")
    return torch.bfloat16 if name == "onednn bf16" else torch.float32, OneDnnWeights


def _tiles() -> Kernels:
    kernels = cpu_kernels()
    if kernels is None or not kernels.multiplies():
        pytest.skip("this processor multiplies no tiles, or there is no compiler")
    return kernels


def test_fused_decoder_that_does_not_fit_its_model_is_not_used(monkeypatch):
    """As with a transformers version in which a layer computes something more."""
    monkeypatch.setattr(FusedDecoder, "__call__", lambda self, ids, positions, run: torch.zeros(ids.shape[1], 48))
    assert tree_model(tiny_model("llama"), tiny_tokenizer()).fused is None
