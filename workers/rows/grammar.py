"""How far one answer that must have a form has come. Knows llguidance's matcher; no tokenizer, no batch."""

from typing import TYPE_CHECKING

from segue.workers.errors import RowError, RowErrorCode

if TYPE_CHECKING:
    from llguidance import LLMatcher

_STUCK = "structured_outputs: too complex, or nothing that this model's tokens can write"


class Grammar:
    """The state of one answer. Each answer has its own."""

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
