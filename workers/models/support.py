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
    if getattr(text, "num_kv_shared_layers", 0):
        reasons.append("its layers share keys and values (num_kv_shared_layers)")
    if getattr(text, "attn_logit_softcapping", None):
        reasons.append(
            "it caps attention logits (attn_logit_softcapping), and capped parts cannot be merged by log-sum-exp"
        )
    if text.model_type == "gpt_oss":
        reasons.append("it has attention sinks")
    return reasons


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


def sliding_window(config: Any) -> int | None:
    """The sliding window of layers that have one, in tokens; None if all layers see everything."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if not window or getattr(text, "use_sliding_window", True) is False:
        return None
    layer_types = getattr(text, "layer_types", None)
    return None if layer_types and "sliding_attention" not in layer_types else int(window)


def max_model_len(config: Any) -> int:
    """The tokens that a row may have, prompt and answer: the context, or the sliding window if that is shorter.

    Up to the window's length a sliding layer sees what a full layer sees. Beyond it the tree would be wrong.
    """
    context = int(config.get_text_config().max_position_embeddings)
    window = sliding_window(config)
    return min(context, window) if window else context


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
