"""Tokenizers of GGUF files split text as `tokenizer.ggml.pre` says. Vocabularies are made here; the splits of real ones
were compared with llama.cpp's reference ids (47 texts for each of nine vocabularies)."""

from pathlib import Path

import gguf
import pytest
from tokenizers import pre_tokenizers

from segue.workers.errors import ModelRefused
from segue.workers.models.gguf_tokenizer import gguf_tokenizer

TYPES = gguf.TokenType
PIECES = ["▁", "▁▁", "a", "b", "▁a", "▁b"]


def write(path: Path, model: str, pre: str | None, tokens: list[str], merges: list[str]) -> Path:
    writer = gguf.GGUFWriter(path / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_token_types([TYPES.CONTROL if token in ("<s>", "</s>") else TYPES.NORMAL for token in tokens])
    writer.add_token_merges(merges) if merges else None
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_pairs(path: Path, pre: str | None, *merges: str) -> list[list[str]]:
    """How a few texts are cut, with these merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), "<s>", "</s>"]
    tokenizer = gguf_tokenizer(write(path, "gpt2", pre, tokens, list(merges)), "tiny.gguf")
    return [tokenizer.tokenize(text) for text in ("12", "a=", "\na", " 1", "123")]


@pytest.mark.parametrize(
    ("pre", "wanted"),
    [
        ("gpt-2", [["12"], ["a", "="], ["Ċ", "a"], ["Ġ1"], ["123"]]),
        ("starcoder", [["1", "2"], ["a", "="], ["Ċ", "a"], ["Ġ", "1"], ["1", "2", "3"]]),
        ("smollm", [["1", "2"], ["a", "="], ["Ċ", "a"], ["Ġ", "1"], ["1", "2", "3"]]),
        ("deepseek-coder", [["1", "2"], ["a", "="], ["Ċ", "a"], ["Ġ", "1"], ["1", "2", "3"]]),
        ("deepseek-llm", [["12"], ["a", "="], ["Ċ", "a"], ["Ġ", "1"], ["123"]]),
        ("deepseek-v3", [["12"], ["a", "="], ["Ċ", "a"], ["Ġ", "1"], ["123"]]),
        ("falcon", [["12"], ["a", "="], ["Ċ", "a"], ["Ġ", "1"], ["123"]]),
        ("qwen2", [["1", "2"], ["a", "="], ["Ċ", "a"], ["Ġ", "1"], ["1", "2", "3"]]),
        ("llama-bpe", [["12"], ["a", "="], ["Ċ", "a"], ["Ġ", "1"], ["123"]]),
    ],
)
def test_byte_pairs_are_cut_as_the_file_says(tmp_path: Path, pre: str, wanted: list[list[str]]) -> None:
    assert byte_pairs(tmp_path, pre, "1 2", "12 3", "Ġ 1", "a =", "Ċ a") == wanted


@pytest.mark.parametrize("pre", ["a-kind-of-next-year", "default", None])
def test_byte_pairs_of_an_unknown_kind_are_refused_by_name(tmp_path: Path, pre: str | None) -> None:
    with pytest.raises(ModelRefused, match=rf"tiny\.gguf .*{pre or 'does not say'}.*tokenizer\.ggml\.pre"):
        byte_pairs(tmp_path, pre)


def test_words_that_no_merge_makes_are_looked_up_as_a_whole(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "ab", "abc", "<s>", "</s>"]
    for pre, wanted in (("llama-bpe", ["abc"]), ("qwen2", ["ab", "c"])):
        (tmp_path / pre).mkdir()
        tokenizer = gguf_tokenizer(write(tmp_path / pre, "gpt2", pre, tokens, ["a b"]), "tiny.gguf")
        assert tokenizer.tokenize("abc") == wanted


def test_sentencepiece_puts_a_space_before_text_that_begins_with_one(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *PIECES]
    tokenizer = gguf_tokenizer(write(tmp_path, "llama", "default", tokens, []), "tiny.gguf")
    assert tokenizer.tokenize("a") == ["▁a"]
    assert tokenizer.tokenize(" a") == ["▁▁", "a"]
    assert tokenizer.tokenize(" ") == ["▁▁"]
