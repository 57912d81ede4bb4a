"""Tiny random models made on the spot, one of each supported kind, and transformers' own answer for a chain."""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from segue.attention.segments import Segment, num_tokens
from segue.attention.visibility import block_sequence_ids
from segue.workers.models.echo import echo_tokenizer
from segue.workers.models.tree_model import TreeModel, tree_model

VOCAB_SIZE = 320  # the echo tokenizer's 259 ids fit
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mistral": {"sliding_window": None},
    "phi3": {},
    "gemma": {"head_dim": 16},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": 6},
}
WINDOW = 7  # tokens, shorter than most prompts of tests
_ALTERNATING = {
    "sliding_window": WINDOW,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_FROM_LAYER_1 = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWED: dict[str, dict[str, Any]] = {  # kinds with sliding windows, in all layers or in some
    "mistral windowed": {"sliding_window": WINDOW},
    "phi3 windowed": {"sliding_window": WINDOW},
    "ministral windowed": {"sliding_window": WINDOW, "head_dim": 16},
    "qwen2 windowed": _FROM_LAYER_1,
    "qwen2_moe windowed": {**_FROM_LAYER_1, **_EXPERTS, "shared_expert_intermediate_size": 32},
    "gemma2 windowed": {
        "sliding_window": WINDOW, "head_dim": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0,
    },
    "gemma3_text windowed": {**_ALTERNATING, "head_dim": 16},
    "cohere2 windowed": _ALTERNATING,
    "olmo3 windowed": _ALTERNATING,
    "exaone4 windowed": _ALTERNATING,
    "gpt_oss windowed": {**_ALTERNATING, **_EXPERTS, **_PLAIN_ROPE, "head_dim": 16},
}  # fmt: skip
PROMPTS = [
    [Segment((5, 9, 11), False), Segment((20, 21, 22, 23, 24), True), Segment((30, 31), True), Segment((7,), False)],
    [
        Segment((5, 9, 11), False),
        Segment((20, 21, 22, 23, 24), True),
        Segment((40, 41, 42), True),
        Segment((7, 8), False),
    ],
    [Segment((5, 9, 11, 60, 61), False), Segment((20, 21), True)],
    [Segment((20, 21, 22, 23, 24), True)],
    [Segment((5, 9, 11), False), Segment((20, 21, 22, 23, 24), True), Segment((30, 31), True), Segment((7,), False)],
]


def tiny_config(kind: str, **changes: Any) -> Any:
    """`kind`: a model type of transformers, or a key of KINDS or WINDOWED, which begins with one."""
    of_kind = {**KINDS, **WINDOWED}.get(kind, {})
    return AutoConfig.for_model(kind.split()[0], **{**_COMMON, **of_kind, **changes})


def tiny_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random fp32 model with weights large enough that attention matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15 if "router" not in name and "gate.weight" not in name else 1.0)
    return model.float().eval()


@functools.cache
def tiny_tree_model(kind: str = "llama", **changes: Any) -> TreeModel:
    """The same weights as `tiny_model(kind)`, over the tree. Shared between tests: an engine never changes it."""
    return tree_model(tiny_model(kind, **changes), tiny_tokenizer())


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with a chat template."""
    return echo_tokenizer()


@functools.cache
def oracle_model(kind: str = "llama", **changes: Any) -> Any:
    """transformers' own model with its own attention."""
    return tiny_model(kind, **changes)


@torch.no_grad()
def oracle_logits(model: Any, segments: list[Segment] | tuple[Segment, ...], generated: tuple[int, ...] = ()) -> Tensor:
    """`[T, V]`: transformers' forward under `create_causal_mask(block_sequence_ids=...)`, all tokens in one pass."""
    tokens = [token for segment in segments for token in segment.token_ids] + list(generated)
    ids = torch.tensor([tokens])
    arguments = {
        "config": model.config,
        "inputs_embeds": model.get_input_embeddings()(ids),
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": torch.arange(len(tokens))[None],
        "block_sequence_ids": block_sequence_ids(segments, len(generated))[None],
    }
    return model(input_ids=ids, attention_mask=_masks(model.config, arguments), use_cache=False).logits[0].float()


def _masks(config: Any, arguments: dict[str, Any]) -> Any:
    """Models with kinds of layers take a mask for each kind."""
    kinds = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    if getattr(config, "layer_types", None):
        return {kind: kinds[kind](**arguments) for kind in {*config.layer_types}}
    has_window = getattr(config, "sliding_window", None) is not None
    return kinds["sliding_attention" if has_window else "full_attention"](**arguments)


def oracle_greedy(model: Any, segments: tuple[Segment, ...], max_tokens: int, eos: frozenset[int]) -> list[int]:
    """The obvious loop: a whole forward with the dense mask for each token."""
    generated: list[int] = []
    while len(generated) < max_tokens:
        token = int(oracle_logits(model, segments, tuple(generated))[-1].argmax())
        generated.append(token)
        if token in eos:
            break
    assert num_tokens(segments) > 0
    return generated
