"""Which models the tree can express, decided from the files of a model before its weights are in memory.

A model that is not known to work is refused, with its kind and the reason. What a configuration does not show, the
probe in `workers/models/tree_model.py` finds: it compares the tree with the model's own attention. Imports no torch,
and transformers only when a function needs it.
"""

import json
import math
from pathlib import Path
from typing import Any

from segue.workers.errors import ModelRefused

SUPPORTED_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})


def read_config(directory: Path) -> Any:
    """The model's transformers configuration.

    Raises ModelRefused for code of the model's own, an unknown kind, or a file that is not a configuration.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelRefused(f"config.json is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelRefused(f"config.json is a {type(raw).__name__}, wanted an object")
    for key in ("auto_map", "trust_remote_code", "_attn_implementation_internal"):
        if key in raw:
            raise ModelRefused(f"config.json asks for code of its own ({key!r}); only transformers' own models are run")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # validators of configurations raise many kinds
        if raw.get("model_type") not in CONFIG_MAPPING:
            raise ModelRefused(
                f"config.json: model_type {raw.get('model_type')!r} is unknown to transformers"
            ) from error
        first_line = (str(error).splitlines() or [""])[0]
        raise ModelRefused(f"config.json cannot be used: {type(error).__name__}: {first_line}") from error


def check_supported(config: Any) -> None:
    """Raises ModelRefused, which names what the segment tree cannot express."""
    for reason in _objections(config):
        raise ModelRefused(f"model of type {config.model_type!r} is not supported: {reason}")


def check_device(config: Any, *, on_gpu: bool) -> None:
    """Raises ModelRefused for a model that runs on CPUs only."""
    if on_gpu and getattr(config.get_text_config(), "attn_logit_softcapping", None):
        raise ModelRefused(
            f"model of type {config.model_type!r} is not supported on GPUs: it caps attention scores "
            "(attn_logit_softcapping), which torch's variable-length kernel does not compute; run it on CPUs"
        )


def _objections(config: Any) -> list[str]:
    from transformers import AutoModelForCausalLM

    if getattr(config, "is_encoder_decoder", False):
        return ["it is an encoder-decoder; wanted a decoder-only model"]
    if type(config) not in AutoModelForCausalLM._model_mapping:  # type: ignore[attr-defined]
        return ["transformers has no causal language model of this type"]
    reasons = []
    text = config.get_text_config()
    strange = sorted(set(getattr(text, "layer_types", None) or ()) - SUPPORTED_LAYERS)
    if strange:
        reasons.append(f"layers of kind {', '.join(strange)} keep a state that cannot be shared as keys and values")
    if not AutoModelForCausalLM._model_mapping[type(config)]._supports_attention_backend:  # type: ignore[attr-defined]
        reasons.append(
            "its attention does not go through transformers' AttentionInterface (state-space, ALiBi or older code)"
        )
    return reasons + _objections_to_heads(text)


def _objections_to_heads(text: Any) -> list[str]:
    reasons = []
    if getattr(text, "num_kv_shared_layers", 0):
        reasons.append("its layers share keys and values (num_kv_shared_layers)")
    if getattr(text, "kv_lora_rank", None):
        reasons.append("it keeps compressed keys and values (multi-head latent attention, kv_lora_rank)")
    differing = {"head_dim", "num_key_value_heads", "num_attention_heads"} & _attributes_by_layer(text)
    if differing:
        reasons.append(f"its layers differ in {', '.join(sorted(differing))}")
    elif getattr(text, "v_head_dim", None) not in (None, head_dim(text)):
        reasons.append(f"its keys have heads of {head_dim(text)} numbers and its values of {text.v_head_dim}")
    if getattr(text, "use_bidirectional_attention", None):
        reasons.append("it attends in both directions (use_bidirectional_attention)")
    return reasons


def _attributes_by_layer(text: Any) -> set[str]:
    """What layers of transformers' heterogeneous models have of their own (Gemma 4)."""
    spec = getattr(text, "_heterogeneity_spec", None)
    return set() if spec is None else set(spec.per_layer_attributes)


def checked_config(directory: Path) -> tuple[Any, Any]:
    """Configuration and tokenizer of a model directory, after every check that needs no weights in memory.

    Raises ModelRefused.
    """
    from transformers import AutoTokenizer

    config = read_config(directory)
    check_supported(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise ModelRefused(f"the model has no readable tokenizer: {error}") from error
    if not tokenizer.is_fast:
        raise ModelRefused("the model has no fast tokenizer (tokenizer.json)")
    check_vocabulary(config, tokenizer)
    check_weights_match(directory, config)
    return config, tokenizer


def layer_windows(config: Any) -> list[int | None]:
    """Of each layer the sliding window in tokens; None if it sees everything."""
    text = config.get_text_config()
    num_layers = int(text.num_hidden_layers)
    window = getattr(text, "sliding_window", None)
    if not window or getattr(text, "use_sliding_window", True) is False:
        return [None] * num_layers
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * num_layers
    return [int(window) if kind == "sliding_attention" else None for kind in kinds]


def max_model_len(config: Any) -> int:
    """The tokens that a row may have, prompt and answer.

    Where rotary positions are stretched, configurations name the length before or after it. This takes the longer one,
    as vLLM does. `dynamic` positions stretch with the row, and a token's keys would depend on what comes later: rows
    keep to the length before that.
    """
    text = config.get_text_config()
    context = int(text.max_position_embeddings)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("linear", "yarn"):
        return context
    before = rope.get("original_max_position_embeddings") or context
    return max(context, int(before * rope.get("factor", 1.0)))


def check_vocabulary(config: Any, tokenizer: Any) -> None:
    """Raises ModelRefused if the tokenizer has ids that the weights do not have."""
    vocab_size = int(config.get_text_config().vocab_size)
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise ModelRefused(
            f"tokenizer and weights do not match: the tokenizer has ids up to {highest}, the weights {vocab_size} rows"
        )


def check_weights_match(directory: Path, config: Any) -> None:
    """Raises ModelRefused if the embedding in the safetensors headers has another shape than the configuration says."""
    # Its framework "np" is used: "pt" maps the whole file, and a checking child has little memory to map.
    from safetensors import safe_open

    text = config.get_text_config()
    wanted = [int(text.vocab_size), int(text.hidden_size)]
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                names = [n for n in file.keys() if n.endswith(("embed_tokens.weight", "embed_in.weight", "wte.weight"))]  # noqa: SIM118
                shapes = {name: list(file.get_slice(name).get_shape()) for name in names}
        except Exception as error:
            raise ModelRefused(f"{path.name} is not a readable safetensors file: {error}") from error
        for name, shape in shapes.items():
            if shape != wanted:
                raise ModelRefused(
                    f"config.json and weights do not match: {name} in {path.name} is {shape}, wanted {wanted}"
                )


def head_dim(config: Any) -> int:
    """The width of a head."""
    return int(getattr(config, "head_dim", None) or int(config.hidden_size) // int(config.num_attention_heads))


def num_kv_heads(config: Any) -> int:
    """The key heads of a layer."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def num_weights(directory: Path) -> int:
    """The number of weights in the safetensors files of a checked directory, by their headers."""
    from safetensors import safe_open

    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def kv_bytes_per_token(config: Any, bytes_per_number: int) -> int:
    """The bytes of one token's keys and values in all layers."""
    text = config.get_text_config()
    return 2 * int(text.num_hidden_layers) * num_kv_heads(text) * head_dim(text) * bytes_per_number
