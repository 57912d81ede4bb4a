"""Continuous batching over the segment tree: rows of token ids in, answers out as they finish.

The core admits rows, asks the scheduler for the next step, lets the runner compute it, draws tokens, and settles what
is done. Knows no text but what was generated, no Ray, no storage; what a step computes is the runner's.
"""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from segue.attention.segments import Segment, canonical_segments, last_tokens, num_tokens
from segue.attention.tree.node import Node
from segue.workers.engine.admission import Admission
from segue.workers.engine.coalescing import RequestCoalescer
from segue.workers.engine.config import EngineConfig
from segue.workers.engine.plan import Prefill, StepPlan, StepResult, StepTooLarge
from segue.workers.engine.runner import StepRunner
from segue.workers.engine.scheduler import Scheduler
from segue.workers.engine.stats import EngineStats
from segue.workers.errors import RowError, RowErrorCode
from segue.workers.models.tree_model import TreeModel
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import EngineRow, GenerationRequest, LogitsRequest, RequestOutput, Score, ScoringRequest
from segue.workers.sampling.bad_words import BadWords
from segue.workers.sampling.draw import draw
from segue.workers.sampling.ending import Finisher
from segue.workers.sampling.grammars import Grammars
from segue.workers.sampling.sample import Request, Sample
from segue.workers.scoring.likelihood import TokenScore, collect

NOTHING_PLANNED = StepPlan((), (), ())
DRAWING_NOTHING = SamplingParams(max_tokens=1)  # parameters of rows that draw nothing


class NoRoomForSteps(torch.OutOfMemoryError):
    """The device has no memory for the smallest step."""


class EngineCore:
    """One model on one device, driven by `add` and `step`."""

    def __init__(self, model: TreeModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config or EngineConfig()
        self.max_model_len = min(self.config.max_model_len or model.max_model_len, model.max_model_len)
        self.runner = StepRunner(model, self.config, self.max_model_len)
        self.nodes = self.runner.nodes
        self.scheduler = Scheduler(
            self.nodes,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
        )
        self._finisher = Finisher(model.tokenizer, model.eos_token_ids, self.max_model_len)
        self._grammars = Grammars(model.tokenizer, model.vocab_size, model.eos_token_ids)
        bad_words = BadWords(model.tokenizer, model.vocab_size)
        self._admission = Admission(self.max_model_len, model.vocab_size, self._grammars, bad_words)
        self._coalescer = RequestCoalescer()
        self.stats = EngineStats()
        self._num_added = 0
        self._rows: dict[Hashable, EngineRow | LogitsRequest] = {}  # those without an answer yet
        self._answers: list[RequestOutput] = []  # that `step` has not returned yet
        self._is_changing = False  # True at the beginning of a change: the one before did not come to its end

    @property
    def has_work(self) -> bool:
        return bool(self._rows or self._answers)

    # -- changes that may be interrupted

    def _begin(self) -> None:
        """Begin to change the engine. An exception, Ctrl-C included, may have ended the change before."""
        if self._is_changing:
            self._start_again()
        self._is_changing = True

    def _start_again(self) -> None:
        """Forget everything that was made of the rows, and queue them as new ones: they draw the same tokens again."""
        self.nodes.clear()
        self.scheduler.clear()
        self._coalescer = RequestCoalescer()
        answered = {output.request_id for output in self._answers}
        self._rows = {request_id: row for request_id, row in self._rows.items() if request_id not in answered}
        for request_id, row in self._rows.items():
            self._queue(self._request(request_id, row))

    # -- rows in

    def add(self, request_id: Hashable, row: EngineRow | LogitsRequest) -> None:
        """Queue a row. One that cannot run becomes an output with `error`, like any other row error.

        Of a continuation to score, all tokens but the last are fed. So it and its context together may be one token
        longer than `max_model_len`; both need at least one token. `is_shared=False`: its nodes are forgotten when it is
        scored. Raises ValueError if a row of this id has no answer yet.
        """
        if request_id in self._rows:
            raise ValueError(f"wanted an id that no row in the engine has, got {request_id!r} again")
        request = self._request(request_id, row)
        error = self._admission.objection(request)
        self._begin()
        if error:
            self._answers.append(request.failure(error))
        else:
            self._queue(request)
        self._rows[request_id] = row
        self.stats.num_rows += 1
        self.stats.num_prompt_tokens += request.num_fed_tokens
        self._is_changing = False

    def _queue(self, request: Request) -> None:
        if not (self.config.enable_prefix_caching and self._coalescer.joins(request)):
            self.scheduler.add(request)

    def _request(self, request_id: Hashable, row: EngineRow | LogitsRequest) -> Request:
        self._num_added += 1
        if isinstance(row, ScoringRequest):
            chain, continuation = self._chain(row.context), tuple(row.continuation)
            root = self._root(num_tokens(chain) + len(continuation) - 1, is_shared=row.is_shared)
            return Request(request_id, chain, DRAWING_NOTHING, b"", self._num_added, root, continuation)
        chain = self._chain(row.segments)
        if isinstance(row, GenerationRequest):
            whole, limit = num_tokens(chain), row.params.max_prompt_tokens(self.max_model_len)
            chain = chain if limit is None else last_tokens(chain, limit)
            root = self._root(num_tokens(chain) + row.params.max_tokens - 1)
            request = Request(request_id, chain, row.params, row.random_key, self._num_added, root)
            request.num_truncated_tokens = whole - num_tokens(chain)
            return request
        root = self._root(num_tokens(chain))
        return Request(request_id, chain, DRAWING_NOTHING, b"", self._num_added, root, wants_logits=True)

    def _chain(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
        return canonical_segments(segments, mask=self.config.mask)

    def _root(self, most_fed: int, *, is_shared: bool = True) -> Node:
        """`most_fed`: the tokens of a row that the model computes, if its answer becomes as long as it may."""
        is_private = not (self.config.enable_prefix_caching and is_shared)
        return self.nodes.root(is_long=self.model.is_long(most_fed), is_private=is_private)

    def abort(self, request_ids: Collection[Hashable]) -> None:
        """Take rows out wherever they are; they are not answered."""
        for request_id in request_ids:
            self._rows.pop(request_id, None)
        self._begin()
        self._answers = [output for output in self._answers if output.request_id not in request_ids]
        needless = self._coalescer.forget(request_ids)
        for request in [*self.scheduler.requests]:
            if request.request_id in needless:
                self.scheduler.abort(request)
        self._is_changing = False

    # -- one step

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """One forward pass; returns the rows that finished with it.

        After an exception of any kind the engine has the rows that it had; the next call computes them anew.
        """
        self._begin()
        done = self._next_step()
        failed = [request.failure(error) for request, error in self.scheduler.take_failed()]
        self._answers.extend(list(self._coalescer.answers([*failed, *done])))
        for output in self._answers:
            self._rows.pop(output.request_id, None)
        self._count_finished(self._answers)
        self._look()
        self._is_changing = False
        answers, self._answers = self._answers, []
        return answers

    def _next_step(self) -> list[RequestOutput]:
        try:
            plan = self.scheduler.plan_step()
            return [] if plan.is_empty else self._run(plan)
        except NoRoomForSteps:
            raise
        except torch.OutOfMemoryError as error:  # outside the model: nodes and tails may be half done
            message = str(error)
        self._start_again()
        self._make_room(NOTHING_PLANNED, message)
        return []

    def _run(self, plan: StepPlan) -> list[RequestOutput]:
        result = self.runner.run(plan)
        if isinstance(result, StepTooLarge):
            self._make_room(plan, result.message)
            return []
        done = [self._scored(*each) for each in zip(plan.scored, result.last_scores, strict=True)]
        done += [self._with_logits(*each) for each in zip(plan.with_logits, result.prompt_logits, strict=True)]
        if result.logits is not None:
            done += self._settle(plan, self._draw(plan, result.logits))
        self._count(plan, result)
        self.scheduler.note_good_step()
        return done

    def _make_room(self, plan: StepPlan, message: str) -> None:
        """What was planned is planned again. Raises NoRoomForSteps if steps cannot be smaller."""
        self.stats.num_shrunk_steps += 1
        if not self.scheduler.make_room_for_steps(plan):
            raise NoRoomForSteps(f"a step of {plan.num_tokens} tokens does not fit: {message}")

    def _scored(self, prefill: Prefill, last: TokenScore) -> RequestOutput:
        """The answer of a scoring row whose last fed token is computed."""
        request = prefill.request
        logprob, is_greedy = collect(prefill.end, request.num_prompt_tokens)
        score = Score(logprob + last[0], len(request.continuation or ()), is_greedy and last[1])
        if not math.isfinite(score.logprob):
            self._discard(request)
            return request.failure(_numeric_error())
        self.scheduler.finish_prompt(prefill)
        return request.answer(score=score)

    def _with_logits(self, prefill: Prefill, logits: Tensor) -> RequestOutput:
        self.scheduler.finish_prompt(prefill)
        return prefill.request.answer(logits=logits)

    def _draw(self, plan: StepPlan, logits: Tensor) -> dict[Request, RowError]:
        """Next tokens of decoding samples, first tokens of complete prompts. Returns the rows without an answer."""
        samples = plan.drawing
        for sample in samples:
            self._begin_form(sample)
        tokens = draw(logits, samples, seed=self.config.seed, eos_token_ids=self.model.eos_token_ids)
        broken: dict[Request, RowError] = {}
        for sample, token in zip(samples, tokens, strict=True):
            error = self._append(sample, token)
            if error is not None:
                broken[sample.request] = error
        return broken

    def _append(self, sample: Sample, token: int | RowError) -> RowError | None:
        """Append the token that was drawn. Returns why the row has no answer, if it has none."""
        if isinstance(token, RowError):
            return token
        if sample.grammar is not None and (error := sample.grammar.accept(token)):
            return error
        self._finisher.append(sample, token)
        self.stats.num_generated_tokens += 1
        return None

    def _begin_form(self, sample: Sample) -> None:
        """A sample that was preempted has its grammar already."""
        outputs = sample.request.params.structured_outputs
        if outputs is not None and sample.grammar is None:
            sample.grammar = self._grammars.begin(outputs)

    def _settle(self, plan: StepPlan, broken: Mapping[Request, RowError]) -> list[RequestOutput]:
        """Move samples on: finished ones out, new ones to decoding, rows without an answer to their error."""
        requests = dict.fromkeys(sample.request for sample in plan.drawing)
        for request in broken:
            self._discard(request)
        for prefill in plan.ready:
            if prefill.request not in broken:
                self.scheduler.start_decoding(prefill)
        for sample in plan.decoding:
            if sample.finish_reason and sample.request not in broken:
                self.scheduler.finish(sample)
        finished = [request for request in requests if request not in broken and request.is_finished]
        return [request.failure(error) for request, error in broken.items()] + [self._answer(r) for r in finished]

    def _answer(self, request: Request) -> RequestOutput:
        """A greedy row draws one sample, which is all of its `n`."""
        drawn = [self._finisher.output(sample) for sample in request.samples]
        copies = drawn if len(drawn) == request.params.n else drawn * request.params.n
        return request.answer(outputs=[replace(output, index=index) for index, output in enumerate(copies)])

    def _discard(self, request: Request) -> None:
        """Take out a row whose numbers are not to be trusted, with what was computed for it."""
        ends = {sample.end for sample in request.samples}
        self.scheduler.abort(request)
        for end in ends:
            self.nodes.discard(end)

    # -- counters

    def _count(self, plan: StepPlan, result: StepResult) -> None:
        stats = self.stats
        stats.num_steps += 1
        stats.num_computed_tokens += sum(len(node) for node in plan.new_nodes)
        stats.num_scored_positions += result.num_scored_positions
        if plan.decoding:
            stats.num_decode_slots += self.config.max_num_seqs
            stats.num_empty_slots += max(0, self.config.max_num_seqs - len(plan.decoding))
        stats.num_preemptions = self.scheduler.num_preemptions
        stats.max_kv_bytes = max(stats.max_kv_bytes, self.runner.memory.allocated_bytes)

    def _count_finished(self, done: list[RequestOutput]) -> None:
        self.stats.num_errors += sum(output.error is not None for output in done)
        self.stats.num_finished_rows += len(done)
        self.stats.num_finished_tokens += sum(output.num_prompt_tokens for output in done)

    def _look(self) -> None:
        """Note the engine's state after the step, for those who watch."""
        stats, memory = self.stats, self.runner.memory
        stats.num_running, stats.num_waiting = self.scheduler.num_active, self.scheduler.num_waiting
        stats.kv_bytes, stats.kv_capacity_bytes = memory.allocated_bytes, memory.budget_bytes


def _numeric_error() -> RowError:
    return RowError(RowErrorCode.NUMERIC_ERROR, "the model gave logits that are not finite numbers")
