"""The bytes that single tokens stand for.

Decoding one token alone does not give them: it may be half a character, and decoders strip the space of a first word.

Knows tokenizers of the three usual kinds: byte-level, SentencePiece with bytes as `<0x0A>`, and others by `decode`.
"""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from segue.workers.models.echo import echo_tokenizer, is_echo
from segue.workers.models.source import locate, safetensors_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # SentencePiece's


def model_token_bytes(source: str, revision: str | None, token_ids: Iterable[int]) -> Iterator[dict[int, bytes]]:
    """One value: the bytes of each token of a model. For a stream of a LimitedProcess."""
    if is_echo(source):
        tokenizer = echo_tokenizer()
    else:
        from transformers import AutoTokenizer

        directory = safetensors_directory(locate(source, revision))
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    yield token_bytes(tokenizer, token_ids)


def token_bytes(tokenizer: "PreTrainedTokenizerBase", token_ids: Iterable[int]) -> dict[int, bytes]:
    """The bytes of each token. A control token's are those of its name; a token that does not exist has none."""
    decoder = tokenizer.backend_tokenizer.decoder if getattr(tokenizer, "is_fast", False) else None  # type: ignore[attr-defined]
    is_byte_level = "ByteLevel" in repr(decoder)
    named = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    found: dict[int, bytes] = {}
    for number in token_ids:
        piece = tokenizer.convert_ids_to_tokens(number)
        if number in named or not isinstance(piece, str):
            found[number] = named.get(number, "").encode()
        else:
            found[number] = _of_byte_level(piece) if is_byte_level else _of_piece(piece)
    return found


def _of_byte_level(piece: str) -> bytes:
    return b"".join(bytes([_BYTES[char]]) if char in _BYTES else char.encode() for char in piece)


def _of_piece(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()


def _alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _alphabet()
