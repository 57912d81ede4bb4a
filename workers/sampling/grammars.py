"""Which tokens may come next in answers that must have a form. Knows llguidance, tokens and forms; no tree, no model.

Shapes: `B` rows, `V` vocabulary.
"""

import functools
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.rows.forms import MISSING, StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KEPT_GRAMMARS = 256
_STUCK = "structured_outputs: too complex, or nothing that this model's tokens can write"


class Grammar:
    """How far one answer has come."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self.matcher = matcher

    def copy(self) -> "Grammar":
        return Grammar(self.matcher.deep_copy())

    def accept(self, token: int) -> RowError | None:
        """Take the next token of the answer. The error, if the form does not allow it."""
        return None if self.matcher.consume_token(token) else RowError(RowErrorCode.BAD_PARAMS, _STUCK)

    @property
    def is_complete(self) -> bool:
        """Whether no token may follow."""
        return self.matcher.is_stopped()

    @property
    def has_end_token(self) -> bool:
        """Whether the last token is an end-of-sequence token, which is not part of the text."""
        return self.matcher.stop_reason() == "EndOfSentence"


class Grammars:
    """Makes grammars over a model's tokens. Nothing is loaded before the first one."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._first = functools.lru_cache(KEPT_GRAMMARS)(self._make)

    def begin(self, outputs: StructuredOutputs) -> Grammar:
        """The grammar of an answer that has no tokens yet.

        Raises RowError(BAD_PARAMS): the form is wrong, llguidance is not installed, or it cannot read the tokenizer.
        """
        return self._first(outputs).copy()

    @functools.cached_property
    def _tokens(self) -> "LLTokenizer":
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise RowError(RowErrorCode.BAD_PARAMS, f"structured_outputs: {MISSING}") from None
        ends = sorted(self._eos_token_ids) or None
        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=ends)
        except ValueError:
            raise RowError(RowErrorCode.BAD_PARAMS, "structured_outputs: not with this model's tokenizer") from None

    def _make(self, outputs: StructuredOutputs) -> Grammar:
        tokens = self._tokens
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)  # the other limits stay: they bound what a row may cost
        with suppress(ValueError):  # the form was not checked before
            matcher = LLMatcher(tokens, outputs.grammar(), log_level=0, limits=limits)
            if not matcher.is_error():
                return Grammar(matcher)
        raise RowError(RowErrorCode.BAD_PARAMS, f"structured_outputs.{outputs.kind} is wrong, or too complex")


def forbidden_tokens(grammars: Sequence[Grammar], vocab_size: int) -> Tensor:
    """`[B, V]` bool. Where no token can follow, none is forbidden: `Grammar.accept` refuses whatever is drawn."""
    from llguidance.numpy import fill_next_token_bitmask_par

    bits = np.zeros((len(grammars), -(-vocab_size // 32)), dtype=np.int32)
    fill_next_token_bitmask_par(_executor(), [(each.matcher, row) for row, each in enumerate(grammars)], bits)
    bits[~bits.any(axis=1)] = -1
    forbidden = np.unpackbits(~bits.view(np.uint8), axis=1, bitorder="little")[:, :vocab_size]
    return torch.from_numpy(forbidden.view(np.bool_))


@functools.cache
def _executor() -> Any:
    from llguidance import LLExecutor

    return LLExecutor(torch.get_num_threads())
