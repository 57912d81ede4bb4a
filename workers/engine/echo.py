"""An engine without weights: the contract of `Engine`, with answers that can be computed by hand.

A row's answer is the end of its own prompt. In scoring, tokens of the context have a high score. Its tokenizer, and
what a `model.source` may ask of it, are in `workers/models/echo.py`.
"""

import ctypes
import time
from collections import deque
from collections.abc import Hashable, Iterable

from segue.attention.segments import Segment
from segue.workers.engine.stats import EngineStats
from segue.workers.errors import RowError, RowErrorCode
from segue.workers.models.echo import echo_settings, echo_tokenizer
from segue.workers.rows.request import (
    CompletionOutput,
    GenerationRequest,
    RequestOutput,
    Score,
    ScoringRequest,
    TokenLogprobs,
)

ROWS_PER_STEP = 256


class EchoEngine:
    """Answers each row with the end of its own prompt, control tokens left out."""

    def __init__(self, *, seconds_per_step: float = 0.0, crash: str = "", hang: str = "", fail: str = "") -> None:
        self.seconds_per_step = seconds_per_step
        self._crash, self._hang, self._fail = crash, hang, fail
        self.tokenizer = echo_tokenizer()
        self.stats = EngineStats()
        self._queue: deque[tuple[Hashable, GenerationRequest | ScoringRequest]] = deque()

    @classmethod
    def from_source(cls, source: str) -> "EchoEngine":
        """What a job's `model.source` describes."""
        seconds, drills = echo_settings(source)
        return cls(seconds_per_step=seconds, **drills)

    @property
    def has_work(self) -> bool:
        return bool(self._queue)

    def add(self, request_id: Hashable, row: GenerationRequest | ScoringRequest) -> None:
        """Queue a row."""
        self._queue.append((request_id, row))
        self.stats.num_rows += 1

    def step(self) -> list[RequestOutput]:
        """Answer up to ROWS_PER_STEP rows."""
        time.sleep(self.seconds_per_step)
        self.stats.num_steps += 1
        self.stats.num_waiting = max(0, len(self._queue) - ROWS_PER_STEP)
        return [self._answer(*self._queue.popleft()) for _ in range(min(len(self._queue), ROWS_PER_STEP))]

    def _answer(self, request_id: Hashable, row: GenerationRequest | ScoringRequest) -> RequestOutput:
        if isinstance(row, ScoringRequest):
            return self._score(request_id, row)
        prompt, params = _tokens(row.segments), row.params
        if params.structured_outputs is not None:
            message = "structured_outputs: an echo answers with its prompt, in whatever form"
            return RequestOutput(request_id, prompt, 0, error=RowError(RowErrorCode.BAD_PARAMS, message))
        text = self.tokenizer.decode(prompt, skip_special_tokens=True)
        self._drill(text)
        text = text[-params.max_tokens :]
        answer = self.tokenizer(text, add_special_tokens=False).input_ids[-params.max_tokens :]
        self._count(prompt)
        self.stats.num_generated_tokens += len(answer) * params.n
        logprobs = None if params.logprobs is None else [_certain(token, params.logprobs) for token in answer]
        samples = [CompletionOutput(i, text, list(answer), "length", logprobs=logprobs) for i in range(params.n)]
        return RequestOutput(request_id, prompt, 0, samples)

    def _score(self, request_id: Hashable, row: ScoringRequest) -> RequestOutput:
        """A token of the context is expected, with log-probability -1; any other has -2."""
        expected = set(_tokens(row.context))
        prompt = _tokens(row.fed_segments)
        self._count(prompt)
        hits = [token in expected for token in row.continuation]
        score = Score(-float(sum(1 if hit else 2 for hit in hits)), len(hits), all(hits))
        return RequestOutput(request_id, [], 0, score=score, num_scored_prompt_tokens=len(prompt))

    def _drill(self, text: str) -> None:
        if self._crash and self._crash in text:
            ctypes.string_at(0)
        if self._fail and self._fail in text:
            raise RuntimeError("a drill")
        while self._hang and self._hang in text:
            time.sleep(60)

    def _count(self, prompt: list[int]) -> None:
        self.stats.num_finished_rows += 1
        self.stats.num_finished_tokens += len(prompt)
        self.stats.num_prompt_tokens += len(prompt)
        self.stats.num_computed_tokens += len(prompt)


def _tokens(segments: Iterable[Segment]) -> list[int]:
    return [token for segment in segments for token in segment.token_ids]


def _certain(token: int, num_top: int) -> TokenLogprobs:
    """An echo has no doubt."""
    return TokenLogprobs(token, 0.0, ((token, 0.0),) if num_top else ())
