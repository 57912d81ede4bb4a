"""A context and its continuation as tokens, joined as lm-evaluation-harness joins them.

Source: `_encode_pair` and `loglikelihood` of lm-evaluation-harness 0.4.13 (`lm_eval/api/model.py`). Knows the
tokenizer; no model, no scores.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from attention.segments import Segment, num_tokens
from workers.prompt_encoder import PromptEncoder
from workers.row_errors import RowError, RowErrorCode


class PairEncoder:
    """Turns (context, continuation) into segments and the token ids to score."""

    def __init__(self, encoder: PromptEncoder, tokenizer: Any) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: the tokenizer's BOS, else its EOS."""
        ids = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        found = next((token for token in ids if token is not None), None)
        if found is None:
            raise ValueError("an empty context needs a tokenizer with a BOS or EOS token, got neither")
        return found

    def encode(
        self, context: str | Sequence[Mapping[str, object]] | Sequence[Segment], continuation: str | Sequence[int]
    ) -> tuple[Sequence[Segment], tuple[int, ...]]:
        """(context segments, continuation token ids). Raises RowError(EMPTY_PROMPT) if nothing is left to score."""
        if isinstance(context, str) and isinstance(continuation, str):
            pair = self._encode_text(context, continuation)
        else:
            pair = self._segments(context), self._tokens(continuation)
        if not pair[1]:
            raise RowError(RowErrorCode.EMPTY_PROMPT, "the continuation has no tokens, wanted at least one")
        return pair

    def _encode_text(self, context: str, continuation: str) -> tuple[Sequence[Segment], tuple[int, ...]]:
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            return self._after_nothing(self._tokens(continuation))
        chain, whole = self._encoder.encode_prompt(stripped), self._encoder.encode_prompt(stripped + continuation)
        return chain, tuple(token for segment in whole for token in segment.token_ids)[num_tokens(chain) :]

    def _after_nothing(self, tokens: tuple[int, ...]) -> tuple[Sequence[Segment], tuple[int, ...]]:
        prefix = self.prefix_token_id
        if tokens[:1] == (prefix,):
            tokens = tokens[1:]
        return [Segment((prefix,), False)], tokens

    def _segments(self, context: Any) -> Sequence[Segment]:
        if not isinstance(context, str) and all(isinstance(part, Segment) for part in context):
            return context
        return self._encoder.encode_prompt(context)

    def _tokens(self, continuation: str | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(continuation, str):
            return tuple(continuation)
        return tuple(self._encoder.encode_continuation(continuation))
