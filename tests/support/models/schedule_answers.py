"""The answer that a row has alone, with ample memory, and whether another answer equals it as far as fp32 tells."""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from segue.attention.segments import Segment, canonical_segments
from segue.workers.engine.config import EngineConfig
from segue.workers.engine.core import EngineCore
from segue.workers.models.tree_model import TreeModel
from segue.workers.rows.request import (
    CompletionOutput,
    EngineRow,
    GenerationRequest,
    LogitsRequest,
    RequestOutput,
    ScoringRequest,
)
from segue.workers.sampling.draw import draw
from segue.workers.sampling.sample import Request, Sample

TOLERANCE = 1e-4  # of logits and log-probabilities
NUM_TRIES = 64  # draws from logits that differ by the tolerance
MAX_CACHED = 20_000

Row = EngineRow | LogitsRequest
Found = TypeVar("Found")


class Alone:
    """Answers of rows alone in an engine, each computed once."""

    def __init__(self, model: TreeModel) -> None:
        self._model = model
        self._engines: dict[Hashable, EngineCore] = {}
        self._answers: dict[Hashable, RequestOutput] = {}

    def check(self, row: Row, output: RequestOutput, config: EngineConfig) -> None:
        """Raises AssertionError if a row's answer under `config` is not what it is alone."""
        if output.error is not None:
            lone = _answer(EngineCore(self._model, config), row)
            assert lone.error is not None, f"a row fails that fits alone: {output.error}"
            assert lone.error.code == output.error.code
            return
        wanted = self._wanted(row, config)
        assert wanted.error is None, f"a row is answered that has an error alone: {wanted.error}"
        assert (output.prompt_token_ids, output.num_scored_prompt_tokens) == (
            wanted.prompt_token_ids,
            wanted.num_scored_prompt_tokens,
        )
        if isinstance(row, GenerationRequest):
            assert len(output.outputs) == row.params.n
            for got, alone in zip(output.outputs, wanted.outputs, strict=True):
                self._check_sample(row, got, alone, config)
        elif isinstance(row, ScoringRequest):
            self._check_score(row, output, wanted, config)
        else:
            assert output.logits is not None
            assert wanted.logits is not None
            torch.testing.assert_close(output.logits, wanted.logits, atol=TOLERANCE, rtol=0)

    def _check_sample(
        self, row: GenerationRequest, got: CompletionOutput, wanted: CompletionOutput, config: EngineConfig
    ) -> None:
        assert got.index == wanted.index
        if got.token_ids == wanted.token_ids:
            assert (got.text, got.finish_reason, got.stop_reason) == (
                wanted.text,
                wanted.finish_reason,
                wanted.stop_reason,
            )
            pairs = zip(got.logprobs or (), wanted.logprobs or (), strict=True)
            assert all(abs(a.logprob - b.logprob) < TOLERANCE for a, b in pairs)
            return
        pairs = zip(got.token_ids, wanted.token_ids, strict=False)
        place = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        assert place is not None, f"{len(got.token_ids)} tokens instead of {len(wanted.token_ids)}"
        possible = self._possible(row, got.index, wanted.token_ids[:place], config)
        assert {got.token_ids[place], wanted.token_ids[place]} <= possible, (
            f"sample {got.index} has {got.token_ids}, alone it has {wanted.token_ids}"
        )

    def _possible(self, row: GenerationRequest, index: int, tokens: list[int], config: EngineConfig) -> set[Any]:
        """What may be drawn after these tokens, from logits that are off by no more than the tolerance."""
        logits = self._logits((*row.segments, Segment(tuple(tokens), False)) if tokens else row.segments, config)
        chain = canonical_segments(row.segments, mask=config.mask)
        core = self._engine(config)
        request = Request(0, chain, row.params, row.random_key, 0, core.nodes.root())
        sample = Sample(request, index, core.nodes.root(), list(tokens))
        noise = (torch.rand(NUM_TRIES, len(logits), generator=torch.Generator().manual_seed(0)) * 2 - 1) * TOLERANCE
        samples = [replace(sample, logprobs=[]) for _ in range(NUM_TRIES)]
        return {*draw(logits + noise, samples, seed=config.seed, eos_token_ids=self._model.eos_token_ids)}

    def _check_score(
        self, row: ScoringRequest, output: RequestOutput, wanted: RequestOutput, config: EngineConfig
    ) -> None:
        got, alone = output.score, wanted.score
        assert got is not None
        assert alone is not None
        assert got.num_tokens == alone.num_tokens == len(row.continuation)
        assert abs(got.logprob - alone.logprob) < TOLERANCE * got.num_tokens
        assert got.is_greedy == alone.is_greedy or self._has_near_tie(row, config)

    def _has_near_tie(self, row: ScoringRequest, config: EngineConfig) -> bool:
        for place in range(len(row.continuation)):
            told = row.continuation[:place]
            best = self._logits((*row.context, Segment(told, False)) if told else row.context, config).topk(2).values
            if best[0] - best[1] < 2 * TOLERANCE:
                return True
        return False

    def _logits(self, segments: object, config: EngineConfig) -> Tensor:
        logits = self._wanted(LogitsRequest(tuple(segments)), replace(config, max_model_len=None)).logits  # type: ignore[arg-type]
        assert logits is not None
        return logits

    def _wanted(self, row: Row, config: EngineConfig) -> RequestOutput:
        key = (config.mask, config.max_model_len, row)
        if len(self._answers) > MAX_CACHED:
            self._answers.clear()
        if key not in self._answers:
            self._answers[key] = _answer(self._engine(config), row)
        return self._answers[key]

    def _engine(self, config: EngineConfig) -> EngineCore:
        key = (config.mask, config.max_model_len)
        if key not in self._engines:
            ample = 2000 * self._model.kv_shape.bytes_per_token
            own = EngineConfig(
                mask=config.mask, max_model_len=config.max_model_len, enable_prefix_caching=False,
                kv_cache_memory_bytes=ample,
            )  # fmt: skip
            self._engines[key] = EngineCore(self._model, own)
        return self._engines[key]


def _answer(core: EngineCore, row: Row) -> RequestOutput:
    core.add("alone", row)
    outputs: list[RequestOutput] = []
    while core.has_work:
        outputs += core.step()
    (output,) = outputs
    return output
