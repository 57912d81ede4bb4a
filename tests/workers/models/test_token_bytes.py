"""The bytes of single tokens: joined, they are the text's own."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from segue.workers.models.echo import CONTROL_TOKENS, echo_tokenizer
from segue.workers.models.token_bytes import model_token_bytes, token_bytes


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: `▁` for a space, and bytes for what the vocabulary lacks."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁w", "or", "ld", "▁"]
    backend = Tokenizer(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], 0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_bytes_of_tokens_of_sentencepiece_keep_the_first_space_and_single_bytes():
    tokenizer = sentencepiece()
    ids = tokenizer("Hello world é").input_ids
    found = token_bytes(tokenizer, ids)
    assert b"".join(found[number] for number in ids) == b" " + "Hello world é".encode()
    assert found[ids[-1]] == b"\xa9"
    assert tokenizer.decode([ids[0]]) == "Hello"  # what decoding alone would have given


@pytest.mark.parametrize("text", ["a b", "é", "😀\n\x00", "  "])
def test_bytes_of_byte_level_tokens_are_the_texts(text):
    tokenizer = echo_tokenizer()
    ids = tokenizer(text).input_ids
    found = token_bytes(tokenizer, [*ids, 10**6])
    assert b"".join(found[number] for number in ids) == text.encode()
    assert found[10**6] == b""


def test_bytes_of_a_control_token_are_its_name():
    tokenizer = echo_tokenizer()
    number = tokenizer.convert_tokens_to_ids(CONTROL_TOKENS[0])
    assert list(model_token_bytes("echo", None, [number])) == [{number: CONTROL_TOKENS[0].encode()}]
