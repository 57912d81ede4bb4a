"""The tokens of words that an answer must not have, as vLLM finds them. Knows a tokenizer; no logits, no rows."""

import functools
from collections.abc import Sequence
from typing import Any

from segue.workers.errors import RowError, RowErrorCode

KEPT_LISTS = 256
TokenIds = tuple[int, ...]


class BadWords:
    """Turns lists of words into token ids."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.ids_of = functools.lru_cache(KEPT_LISTS)(self._token_ids)

    def _token_ids(self, words: tuple[str, ...]) -> tuple[TokenIds, ...]:
        """Each word as at the beginning of a text, and as in the middle if it is another first token there.

        Raises RowError(BAD_PARAMS).
        """
        return tuple(dict.fromkeys(ids for word in words for ids in self._forms_of(word)))

    def _forms_of(self, word: str) -> Sequence[TokenIds]:
        first, later = self._encode(word.lstrip()), self._encode(" " + word.lstrip())
        if not first or max(first) >= self._vocab_size:
            raise RowError(RowErrorCode.BAD_PARAMS, "sampling_params.bad_words: a word that this model's tokens lack")
        is_other_word = later and later[0] != first[0] and len(later) == len(first)
        return [first, later] if is_other_word else [first]

    def _encode(self, text: str) -> TokenIds:
        try:
            return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)
        except (TypeError, ValueError, UnicodeError):  # a lone surrogate
            raise RowError(RowErrorCode.BAD_PARAMS, "sampling_params.bad_words: a word that is no text") from None


def ends_of(words: Sequence[TokenIds], said: Sequence[int]) -> set[int]:
    """The tokens that would complete one of `words` after `said`."""
    return {
        word[-1]
        for word in words
        if len(word) == 1 or (len(said) >= len(word) - 1 and tuple(said[1 - len(word) :]) == word[:-1])
    }
