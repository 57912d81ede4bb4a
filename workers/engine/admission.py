"""Whether a row can run in an engine: its length must fit into the model's context, its tokens must be the model's, its
form must suit the tokenizer.

Knows requests, limits and forms; no tree, no batch.
"""

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.rows.params import SamplingParams
from segue.workers.sampling.grammars import Grammars
from segue.workers.sampling.sample import Request


def objection(request: Request, max_model_len: int, vocab_size: int, grammars: Grammars) -> RowError | None:
    """Why the row cannot run; None if it can."""
    length = request.num_prompt_tokens
    if request.continuation is not None:
        error = _scoring_objection(length, len(request.continuation), max_model_len)
        return error or _foreign_tokens(request, vocab_size)
    if length == 0:
        return RowError(RowErrorCode.EMPTY_PROMPT, "the prompt has no tokens, wanted at least one")
    if length >= max_model_len:
        message = f"the prompt has {length} tokens, wanted fewer than {max_model_len} (max_model_len)"
        return RowError(RowErrorCode.PROMPT_TOO_LONG, message)
    return _foreign_tokens(request, vocab_size) or _params_objection(request.params, vocab_size, grammars)


def _foreign_tokens(request: Request, vocab_size: int) -> RowError | None:
    """Tokens that the model has no vectors for end a process, on a GPU a device."""
    parts = [segment.token_ids for segment in request.segments if segment.token_ids]
    if request.continuation:
        parts.append(request.continuation)
    if all(min(part) >= 0 and max(part) < vocab_size for part in parts):
        return None
    message = f"the prompt has token ids that the model does not have, wanted 0 to {vocab_size - 1}"
    return RowError(RowErrorCode.BAD_PROMPT, message)


def _params_objection(params: SamplingParams, vocab_size: int, grammars: Grammars) -> RowError | None:
    if any(token >= vocab_size for token in params.stop_token_ids):
        message = f"sampling_params.stop_token_ids: wanted ids from 0 to {vocab_size - 1}, which the model has"
        return RowError(RowErrorCode.BAD_PARAMS, message)
    try:
        if params.structured_outputs is not None:
            grammars.begin(params.structured_outputs)
    except RowError as error:
        return error
    return None


def _scoring_objection(num_context: int, num_continuation: int, max_model_len: int) -> RowError | None:
    if not num_context or not num_continuation:
        return RowError(RowErrorCode.EMPTY_PROMPT, "context and continuation must each have at least one token")
    if num_context + num_continuation > max_model_len + 1:
        message = (
            f"context and continuation have {num_context + num_continuation} tokens, "
            f"wanted at most {max_model_len + 1} (max_model_len and the last, which is not fed)"
        )
        return RowError(RowErrorCode.PROMPT_TOO_LONG, message)
    return None
