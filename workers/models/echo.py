"""The echo: a model without files, for tests of everything around a model and for dry runs of a job.

`source: echo`, or `echo:0.5` for steps that take half a second. `echo?crash=WORD&hang=WORD&fail=WORD` are drills: the
worker's process ends with a segmentation fault, stands still, or raises, at a row that has the word. Its prompts are
bytes: a token is a byte of UTF-8, and the chat template is ChatML with three control tokens.

Knows how it is named and its tokenizer. What it answers is for `workers/engine/echo.py`. Imports no torch.
"""

import re
from typing import Any
from urllib.parse import parse_qsl

SOURCE = "echo"
CONTROL_TOKENS = ("<|start|>", "<|end|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MAX_MODEL_LEN = 1 << 20
_SOURCE = re.compile(r"echo(?::(?P<seconds>\d+(?:\.\d+)?))?(?P<drills>(?:[?&](?:crash|hang|fail)=\w+)*)")


def is_echo(source: str) -> bool:
    """Whether a job's `model.source` names the echo."""
    return _SOURCE.fullmatch(source) is not None


def echo_settings(source: str) -> tuple[float, dict[str, str]]:
    """(seconds a step takes, the word of each drill) of a job's `model.source`. Raises ValueError."""
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise ValueError(f"got {source!r}, wanted echo[:SECONDS][?crash=WORD][&hang=WORD][&fail=WORD]")
    return float(match["seconds"] or 0), dict(parse_qsl(match["drills"].lstrip("?")))


def echo_tokenizer() -> Any:
    """A byte-level tokenizer (256 bytes and three control tokens) with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(CONTROL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=CONTROL_TOKENS[1], pad_token=CONTROL_TOKENS[2]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
