"""A context and its continuations as tokens, joined as lm-evaluation-harness joins them.

Source: `_encode_pair` and `loglikelihood` of lm-evaluation-harness 0.4.13 (`lm_eval/api/model.py`). Knows prompts as
blocks of text, and their tokenizer; no model, no scores.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from segue.attention.segments import Segment, num_tokens
from segue.workers.errors import RowError, RowErrorCode
from segue.workers.prompts.encoder import PromptEncoder
from segue.workers.prompts.presets import Block, Row, text_blocks

BATCH_TEXTS = 16  # tokenised in one call
Context = str | Sequence[Mapping[str, object]] | Sequence[Segment]


class PairEncoder:
    """Turns a context and a continuation into segments and the token ids to score.

    A context of text is tokenised together with its continuation, and its last white space belongs to the continuation.
    A chat is tokenised alone, and the continuation follows its generation header.
    """

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

    def encode_all(
        self, pairs: Sequence[tuple[Context, str | Sequence[int]]]
    ) -> list[tuple[Sequence[Segment], tuple[int, ...]]]:
        """(context segments, continuation token ids) of each pair. Equal contexts of text are tokenised once.

        Raises RowError(EMPTY_PROMPT) if a continuation has no tokens.
        """
        found: dict[int, tuple[Sequence[Segment], tuple[int, ...]]] = {}
        texts: dict[str, dict[int, str]] = {}  # context -> its continuations by position
        for index, (context, continuation) in enumerate(pairs):
            if isinstance(context, str) and isinstance(continuation, str):
                texts.setdefault(context, {})[index] = continuation
            else:
                found[index] = self._segments(context), self._tokens(continuation)
        for context, continuations in texts.items():
            chain, tokens = self._encode_blocks(text_blocks([Row(context)]), list(continuations.values()))
            found.update((index, (chain, ids)) for index, ids in zip(continuations, tokens, strict=True))
        if any(not tokens for _, tokens in found.values()):
            raise RowError(RowErrorCode.EMPTY_PROMPT, "the continuation has no tokens, wanted at least one")
        return [found[index] for index in range(len(pairs))]

    def encode_row(
        self, row: Mapping[str, object], continuations: Sequence[str], max_context: int
    ) -> tuple[Sequence[Segment], list[tuple[int, ...]]]:
        """A row's prompt as the context, and the tokens of each continuation, of which any may have none.

        Raises RowError. A context of more than `max_context` tokens is refused before any continuation is tokenised.
        """
        blocks = self._encoder.blocks_of(row)
        if blocks is None:
            chain = self._encoder.encode(row, may_be_blank=True)
            _check_context(chain, max_context)
            return chain, [self._tokens(text) for text in continuations]
        return self._encode_blocks(blocks, continuations, max_context)

    def encode_answer(self, row: Mapping[str, object], answer: str) -> tuple[Sequence[Segment], tuple[int, ...]]:
        """A prompt as generation sees it, with the white space at its end, and an answer to it. Raises RowError."""
        chain = self._encoder.encode(row)
        if not num_tokens(chain):
            raise RowError(RowErrorCode.EMPTY_PROMPT, "the prompt has no tokens, wanted at least one")
        return chain, self._tokens(answer)

    def _encode_blocks(
        self, blocks: Sequence[Block], continuations: Sequence[str], max_context: int | None = None
    ) -> tuple[Sequence[Segment], list[tuple[int, ...]]]:
        """`encode_row` for a context of text. The context is tokenised again with a few continuations at a time."""
        context, space = _without_last_space(blocks)
        if not context:
            # Control tokens in a continuation are text and nothing is added to it, so it cannot begin with the prefix.
            return [Segment((self.prefix_token_id,), False)], [self._tokens(space + text) for text in continuations]
        chain = self._encoder.encode_blocks(context)
        _check_context(chain, max_context)
        start, found = num_tokens(chain), []
        for first in range(0, len(continuations), BATCH_TEXTS):
            few = continuations[first : first + BATCH_TEXTS]
            wholes = self._encoder.token_ids_of_many([_extended(context, space + text) for text in few])
            found += [whole[start:] for whole in wholes]
        return chain, found

    def encode_text(self, text: str) -> tuple[tuple[int, ...], int]:
        """A text to score as a whole: (its tokens, the token that its first one is predicted from). Raises RowError."""
        return self._whole_text(text_blocks([Row(text)]))

    def encode_row_text(self, row: Mapping[str, object]) -> tuple[str, tuple[int, ...], int]:
        """(text, tokens, the token before them) of a row whose prompt is scored as a whole. Raises RowError."""
        blocks = self._encoder.blocks_of(row)
        if blocks is None:
            raise ValueError("a chat cannot be scored as one text")
        return "".join(part.text for _, parts in blocks for part in parts), *self._whole_text(blocks)

    def _whole_text(self, blocks: Sequence[Block]) -> tuple[tuple[int, ...], int]:
        tokens = _tokens_of(self._encoder.encode_blocks(blocks))
        if not tokens:
            raise RowError(RowErrorCode.EMPTY_PROMPT, "the text has no tokens, wanted at least one")
        return tokens, self.prefix_token_id

    def _segments(self, context: Any) -> Sequence[Segment]:
        if not isinstance(context, str) and all(isinstance(part, Segment) for part in context):
            return context
        return self._encoder.encode_prompt(context)

    def _tokens(self, continuation: str | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(continuation, str):
            return tuple(continuation)
        return tuple(self._encoder.encode_continuation(continuation))


def _check_context(chain: Sequence[Segment], max_context: int | None) -> None:
    if max_context is not None and num_tokens(chain) > max_context:
        message = f"the context has {num_tokens(chain):,} tokens, wanted at most {max_context:,} (max_model_len)"
        raise RowError(RowErrorCode.PROMPT_TOO_LONG, message)


def _without_last_space(blocks: Sequence[Block]) -> tuple[tuple[Block, ...], str]:
    """(the blocks without the white space at their end, that white space). Blank text leaves no blocks."""
    kept, space = list(blocks), ""
    while kept:
        bidirectional, parts = kept.pop()
        while parts:
            *before, last = parts
            text = last.text.rstrip()
            space = last.text[len(text) :] + space
            if text:
                return (*kept, (bidirectional, (*before, type(last)(text)))), space
            parts = tuple(before)
    return (), space


def _extended(blocks: tuple[Block, ...], text: str) -> tuple[Block, ...]:
    """The blocks with a row's text after them. That text is causal, whatever the last block is."""
    bidirectional, parts = blocks[-1]
    if bidirectional:
        return (*blocks, (False, (Row(text),)))
    return (*blocks[:-1], (False, (*parts, Row(text))))


def _tokens_of(segments: Sequence[Segment]) -> tuple[int, ...]:
    return tuple(token for segment in segments for token in segment.token_ids)
