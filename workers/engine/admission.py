"""Whether a row can run in an engine: its length must fit into the model's context, its form must suit the tokenizer.

Knows requests, limits and forms; no tree, no batch.
"""

from segue.workers.errors import RowError, RowErrorCode
from segue.workers.sampling.grammars import Grammars
from segue.workers.sampling.sample import Request


def objection(request: Request, max_model_len: int, grammars: Grammars) -> RowError | None:
    """Why the row cannot run; None if it can."""
    length = request.num_prompt_tokens
    if request.continuation is not None:
        return _scoring_objection(length, len(request.continuation), max_model_len)
    if length == 0:
        return RowError(RowErrorCode.EMPTY_PROMPT, "the prompt has no tokens, wanted at least one")
    if length >= max_model_len:
        message = f"the prompt has {length} tokens, wanted fewer than {max_model_len} (max_model_len)"
        return RowError(RowErrorCode.PROMPT_TOO_LONG, message)
    try:
        if request.params.structured_outputs is not None:
            grammars.begin(request.params.structured_outputs)
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
