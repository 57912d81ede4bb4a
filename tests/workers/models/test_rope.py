"""Every kind of rotary positions against transformers: of a row alone, in a batch, in pieces, with a warm cache."""

import pytest
import torch
from tiny_models import oracle_greedy, oracle_logits, tiny_config, tiny_model, tiny_tokenizer

from segue.attention.segments import Segment, canonical_segments
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.errors import ModelRefused
from segue.workers.models import support
from segue.workers.models.long_rope import LongRope
from segue.workers.models.tree_model import tree_model
from segue.workers.rows.params import SamplingParams

TOLERANCE = 1e-4
SHORT = 24  # tokens up to which rotary positions are those of the first training
SHARED = Segment(tuple(range(3, 13)), True)


def rope(kind, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **parameters}}


def long_rope(most_short=SHORT, **parameters):
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 9.0]}
    length = {"original_max_position_embeddings": most_short}  # kinds of configurations look in one place or the other
    return {**rope("longrope", factor=4.0, **length, **factors, **parameters), **length}


KINDS = {
    "linear": ("llama", rope("linear", factor=3.0)),
    "llama3": (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=SHORT),
    ),
    "yarn": ("qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=SHORT)),
    "dynamic": ("llama", rope("dynamic", factor=2.0)),
    "longrope": ("phi3", long_rope()),
    "longrope, fused": ("llama", long_rope()),
    "longrope, part of a head": ("phi3", {**long_rope(partial_rotary_factor=0.5), "hidden_size": 96}),
    "part of a head, phi": ("phi", rope("default", partial_rotary_factor=0.5)),
    "part of a head, glm4": ("glm4", {**rope("default", partial_rotary_factor=0.5), "head_dim": 16}),
    "part of a head, gpt_neox": ("gpt_neox", rope("default", partial_rotary_factor=0.5)),
}


def prompts():
    """Short and long rows that begin alike, one of them exactly as long as a short one may be."""
    rows = [(4, 1), (SHORT - 10, 0), (SHORT - 9, 0), (40, 3), (2, 2)]
    return [
        [SHARED, Segment(tuple(100 + row + i for i in range(own)), True), Segment((9,) * header, False)]
        for row, (own, header) in enumerate(rows)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["segment", "causal"])
@pytest.mark.parametrize("config", [{}, {"max_num_batched_tokens": 5, "max_num_seqs": 2}], ids=["whole", "pieces"])
def test_logits_of_each_row_equal_transformers_own_of_the_row_alone(kind, mask, config):
    model_type, changes = KINDS[kind]
    subject = Engine(tree_model(tiny_model(model_type, **changes), tiny_tokenizer()), EngineConfig(mask=mask, **config))
    chains = [canonical_segments(prompt, mask=mask) for prompt in prompts()]
    wanted = torch.stack([oracle_logits(tiny_model(model_type, **changes), chain)[-1] for chain in chains])
    torch.testing.assert_close(subject.logits(prompts()), wanted, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(subject.logits(prompts()[::-1]), wanted.flip(0), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(subject.logits(prompts()[:1]), wanted[:1], atol=TOLERANCE, rtol=0)


def test_short_and_long_rows_differ_where_transformers_makes_them_differ():
    """Guards the test above: the two sets of frequencies give other logits."""
    chain = canonical_segments(prompts()[3], mask="causal")
    models = [tiny_model("phi3", **long_rope(most_short)) for most_short in (SHORT, 400)]
    as_long, as_short = (oracle_logits(model, chain)[-1] for model in models)
    assert (as_long - as_short).abs().max() > 100 * TOLERANCE


def test_answer_that_may_become_long_is_of_a_long_row_from_its_first_token():
    """Its tokens are those of a model that takes the frequencies of long rows for every row."""
    always_long = tiny_model("phi3", **long_rope())
    always_long.model.rotary_emb = LongRope(always_long.model.rotary_emb)
    always_long.model.rotary_emb._frequencies = always_long.model.rotary_emb._frequencies[[1, 1]]
    prompt, chain = prompts()[0], canonical_segments(prompts()[0], mask="causal")
    params = [SamplingParams(max_tokens=30, ignore_eos=True), SamplingParams(max_tokens=5, ignore_eos=True)]
    subject = Engine(tree_model(tiny_model("phi3", **long_rope()), tiny_tokenizer()), EngineConfig(mask="causal"))
    long, short = subject.generate([prompt, prompt], params)
    assert long.outputs[0].token_ids == oracle_greedy(always_long, chain, 30, frozenset())
    assert short.outputs[0].token_ids == oracle_greedy(tiny_model("phi3", **long_rope()), chain, 5, frozenset())


def test_context_is_the_stretched_one_as_in_vllm():
    def context(**changes):
        return support.max_model_len(tiny_config("llama", **changes))

    assert context() == 512
    assert context(**rope("linear", factor=4.0)) == 2048
    assert context(**rope("yarn", factor=8.0, original_max_position_embeddings=512)) == 4096
    assert context(**rope("yarn", factor=2.0, original_max_position_embeddings=256)) == 512
    assert context(**rope("dynamic", factor=4.0)) == 512
    assert context(**KINDS["llama3"][1]) == 512


def test_longrope_of_a_models_own_is_refused():
    with pytest.raises(ModelRefused, match="longest row of a batch"):
        tree_model(tiny_model("phimoe", num_local_experts=2, **long_rope(short_mscale=1.1, long_mscale=1.2)), None)
