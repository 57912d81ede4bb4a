"""Whether a row can run in an engine: its length must fit into the model's context, its tokens must be the model's, its
form must suit the tokenizer.

Knows requests, limits and forms; no tree, no batch.
"""

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.sampling.bad_words import BadWords
from segue.workers.sampling.grammars import Grammars
from segue.workers.sampling.sample import Request


class Admission:
    """What an engine takes."""

    def __init__(self, max_model_len: int, vocab_size: int, grammars: Grammars, bad_words: BadWords) -> None:
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._bad_words = bad_words

    def objection(self, request: Request) -> RowError | None:
        """Why the row cannot run; None if it can. Then `request` has the tokens of its bad words."""
        if request.continuation is not None:
            return self._scoring_objection(request.num_prompt_tokens, len(request.continuation)) or self._foreign(
                request
            )
        return self._prompt_objection(request.num_prompt_tokens) or self._foreign(request) or self._params(request)

    def _prompt_objection(self, length: int) -> RowError | None:
        if length == 0:
            return RowError(RowErrorCode.EMPTY_PROMPT, "the prompt has no tokens, wanted at least one")
        if length >= self._max_model_len:
            message = f"the prompt has {length} tokens, wanted fewer than {self._max_model_len} (max_model_len)"
            return RowError(RowErrorCode.PROMPT_TOO_LONG, message)
        return None

    def _scoring_objection(self, num_context: int, num_continuation: int) -> RowError | None:
        if not num_context or not num_continuation:
            return RowError(RowErrorCode.EMPTY_PROMPT, "context and continuation must each have at least one token")
        if num_context + num_continuation > self._max_model_len + 1:
            message = (
                f"context and continuation have {num_context + num_continuation} tokens, "
                f"wanted at most {self._max_model_len + 1} (max_model_len and the last, which is not fed)"
            )
            return RowError(RowErrorCode.PROMPT_TOO_LONG, message)
        return None

    def _foreign(self, request: Request) -> RowError | None:
        """Tokens that the model has no vectors for end a process, on a GPU a device."""
        parts = [*(segment.token_ids for segment in request.segments), request.continuation or ()]
        if all(min(part) >= 0 and max(part) < self._vocab_size for part in parts if part):
            return None
        message = f"the prompt has token ids that the model does not have, wanted 0 to {self._vocab_size - 1}"
        return RowError(RowErrorCode.BAD_PROMPT, message)

    def _params(self, request: Request) -> RowError | None:
        for name, ids in request.params.named_token_ids.items():
            if any(token >= self._vocab_size for token in ids):
                message = f"sampling_params.{name}: wanted ids from 0 to {self._vocab_size - 1}, which the model has"
                return RowError(RowErrorCode.BAD_PARAMS, message)
        try:
            request.bad_words = self._bad_words.ids_of(request.params.bad_words)
            if request.params.structured_outputs is not None:
                self._grammars.begin(request.params.structured_outputs)
        except RowError as error:
            return error
        return None
