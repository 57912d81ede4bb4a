"""When a sample ends, and what its text is.

Knows tokens, text and parameters; no tree, no batch.
"""

from typing import Any

from segue.workers.rows.request import CompletionOutput
from segue.workers.sampling.sample import Sample

MAX_STOP_WINDOW_TOKENS = 64  # stop strings are looked for in the last tokens only: decoding all is quadratic
UNFINISHED = "\ufffd"  # what decoders write for a character whose bytes are not all there; vLLM leaves it out, too


class Finisher:
    """Decides after each drawn token whether the sample is done, and renders its text."""

    def __init__(self, tokenizer: Any, eos_token_ids: frozenset[int], max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.max_model_len = max_model_len

    def append(self, sample: Sample, token: int) -> None:
        """Add a token, and set `finish_reason` if it is the last.

        An answer ends with an end-of-sequence or stop token, a stop string, or its length; an answer with a form ends
        where nothing may follow.
        """
        sample.token_ids.append(token)
        params = sample.request.params
        if sample.grammar is not None:
            sample.finish_reason = "stop" if sample.grammar.is_complete else None
        elif len(sample.token_ids) >= params.min_tokens:
            if token in self.eos_token_ids and not params.ignore_eos:
                sample.finish_reason = "stop"
            elif token in params.stop_token_ids:
                sample.finish_reason, sample.stop_reason = "stop", token
            elif params.stop and len(sample.token_ids) > params.min_tokens:
                self._find_stop(sample)
        if sample.finish_reason is None and self._is_full(sample):
            sample.finish_reason = "length"

    def _is_full(self, sample: Sample) -> bool:
        return len(sample.token_ids) >= sample.request.params.max_tokens or sample.num_tokens >= self.max_model_len

    def _find_stop(self, sample: Sample) -> None:
        """Cut the text before the first stop string, or after it if the row wants it included.

        As in vLLM, a stop string must end after the first `min_tokens` tokens.
        """
        params = sample.request.params
        window = max(MAX_STOP_WINDOW_TOKENS, *(len(stop) + 8 for stop in params.stop))
        if not any(stop in self._decode(sample, sample.token_ids[-window:]) for stop in params.stop):
            return
        text = self._decode(sample, sample.token_ids)
        least = len(self._decode(sample, sample.token_ids[: params.min_tokens]).rstrip(UNFINISHED))
        places = [(text.find(stop, max(0, least + 1 - len(stop))), stop) for stop in params.stop]
        found = [place for place in places if place[0] >= 0]
        if not found:
            return
        position, stop = min(found)
        sample.text = text[: position + len(stop)] if params.include_stop_str_in_output else text[:position]
        sample.finish_reason, sample.stop_reason = "stop", stop

    def _decode(self, sample: Sample, token_ids: list[int]) -> str:
        skip = sample.request.params.skip_special_tokens
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)

    def _said(self, sample: Sample) -> list[int]:
        """Its tokens, without the last one if that only ended the answer."""
        if sample.finish_reason != "stop" or sample.request.params.include_stop_str_in_output:
            return sample.token_ids
        last = sample.token_ids[-1]
        if sample.grammar is not None:
            is_end = sample.grammar.has_end_token
        else:
            is_end = last in self.eos_token_ids or sample.stop_reason == last
        return sample.token_ids[:-1] if is_end else sample.token_ids

    def output(self, sample: Sample) -> CompletionOutput:
        """The finished sample in vLLM's shape."""
        text, is_cut = self._text_of(sample)
        wants_logprobs = sample.request.params.logprobs is not None
        return CompletionOutput(
            index=sample.index,
            text=text,
            token_ids=list(sample.token_ids),
            finish_reason=sample.finish_reason or "error",
            stop_reason=sample.stop_reason,
            logprobs=list(sample.logprobs) if wants_logprobs else None,
            ends_inside_character=is_cut,
        )

    def _text_of(self, sample: Sample) -> tuple[str, bool]:
        """Its text, and whether a character that is not complete was left out at its end."""
        if sample.text is not None:
            return sample.text, False
        text = self._decode(sample, self._said(sample))
        has_form = sample.grammar is not None and sample.finish_reason == "stop"  # such a text has whole characters
        complete = text if has_form else text.rstrip(UNFINISHED)
        return complete, complete != text
