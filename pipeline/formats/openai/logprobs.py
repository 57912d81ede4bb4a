"""Log-probabilities of an answer as OpenAI writes them: with the text of each token.

Knows the two forms of the two endpoints, and asks for the bytes of tokens; no tokenizer.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

LOWEST = -9999.0  # OpenAI's for what has no probability; JSON has no infinity
TokenBytes = Callable[[int], bytes]


def token_ids_in(logprobs: Sequence[Mapping[str, Any]] | None) -> set[int]:
    """The tokens whose bytes are needed."""
    tokens = logprobs or ()
    return {one["token_id"] for token in tokens for one in (token, *(token["top"] or ()))}


def chat_logprobs(logprobs: Sequence[Mapping[str, Any]], bytes_of: TokenBytes) -> dict[str, Any]:
    """The `logprobs` of a choice of a chat."""

    def entry(one: Mapping[str, Any]) -> dict[str, Any]:
        content = bytes_of(one["token_id"])
        return {"token": _text(content), "logprob": _finite(one["logprob"]), "bytes": list(content)}

    content = [entry(token) | {"top_logprobs": [entry(one) for one in token["top"] or ()]} for token in logprobs]
    return {"content": content, "refusal": None}


def completion_logprobs(logprobs: Sequence[Mapping[str, Any]], bytes_of: TokenBytes) -> dict[str, Any]:
    """The `logprobs` of a choice of a completion. The token that was drawn is always among its alternatives."""
    texts = [_text(bytes_of(token["token_id"])) for token in logprobs]
    offsets = list(accumulate(map(len, texts), initial=0))[: len(texts)]
    tops = [
        {_text(bytes_of(one["token_id"])): _finite(one["logprob"]) for one in (*(token["top"] or ()), token)}
        for token in logprobs
    ]
    values = [_finite(token["logprob"]) for token in logprobs]
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
