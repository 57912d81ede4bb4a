"""Tokenizers of GGUF files, as the file's `tokenizer.ggml.pre` says that text is split before it is encoded.

transformers 5.23 builds most of them; for the others it takes GPT-2's splits, and says nothing. The splits here are
those of the models' own tokenizer.json. A kind that neither knows is refused: its token ids would be wrong in places.
Knows tokenizers; no weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from segue.workers.errors import ModelRefused

# Kinds for which transformers' tokenizers of byte pairs are right as they are: GPT-2's own splits.
_AS_GPT2 = frozenset(
    {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0", "mellum", "exaone4",
     "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code", "roberta-bpe", "modern-bert"}
)  # fmt: skip
_DIGITS_APART = frozenset(
    {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"}
)
# Kinds whose vocabulary has words that no merges make: they are looked up as a whole.
_WHOLE_WORDS = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken", "glm4",
     "jina-v5-nano"}
)  # fmt: skip
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str, tuple[str, ...]] = {
    "deepseek-llm": (
        "[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}+",
    ),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), (r"\p{N}{1,3}", _KANA, _DEEPSEEK_V3)),
    **dict.fromkeys(("chatglm-bpe", "glm4"), (_LLAMA3,)),
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open", "grok-2"), (_QWEN2,)),
}  # fmt: skip
_SPM_OF_TRANSFORMERS = ("gemma", "phi3")  # architectures whose spaces it treats in their own way


def gguf_tokenizer(directory: Path, name: str) -> Any:
    """The tokenizer of a GGUF file. Raises ModelRefused if it cannot be built as the file says."""
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(directory / name))
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    tokenizer = AutoTokenizer.from_pretrained(str(directory), gguf_file=name)
    if kind == "gpt2":
        _correct_splits(tokenizer.backend_tokenizer, str(pre), name)
    elif kind == "llama" and not metadata["general.architecture"].startswith(_SPM_OF_TRANSFORMERS):
        _correct_spaces(tokenizer.backend_tokenizer, has_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True))
    return tokenizer


def _correct_splits(backend: Any, pre: str, name: str) -> None:
    """Split text as the file says, unless transformers does so already."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if pre in _OWN:
        backend.pre_tokenizer = _OWN[pre]()
    elif pre in _SPLITS:
        backend.pre_tokenizer = _split_by(*_SPLITS[pre])
    elif pre not in GGUF_PRE_TOKENIZER_SPLITS and pre not in _AS_GPT2:
        got = f"text is split as {pre!r} says" if pre != "None" else "it does not say how text is split"
        raise ModelRefused(
            f"model.source: {name} has a tokenizer that cannot be built right: {got} (tokenizer.ggml.pre). Use the "
            "model's own folder with its tokenizer.json, or a newer GGUF file of it"
        )
    if pre in _WHOLE_WORDS:
        backend.model.ignore_merges = True


def _correct_spaces(backend: Any, *, has_prefix: bool) -> None:
    """SentencePiece puts one space more before the text, also if it begins with one."""
    from tokenizers import normalizers

    prefix = [normalizers.Prepend("▁")] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None


def _split_by(*patterns: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _digits_apart() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _falcon() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )


_OWN: dict[str, Callable[[], Any]] = dict.fromkeys(_DIGITS_APART, _digits_apart) | {"falcon": _falcon}
