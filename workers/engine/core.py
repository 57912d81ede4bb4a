"""Continuous batching over the segment tree: rows of token ids in, answers out as they finish.

Knows the model, the tree and the scheduler; no text but what it generated, no Ray, no storage.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from segue.attention.backend import TreeStep
from segue.attention.cuda.backend import VarlenBackend
from segue.attention.memory.budget import Tail
from segue.attention.memory.pool import KVPool
from segue.attention.segments import canonical_segments
from segue.attention.tree.blocks import DecodeQuery, StepBlocks, blocks_of
from segue.attention.tree.tree import SegmentTree
from segue.workers.devices.devices import BackendName, kv_memory_bytes, make_backend
from segue.workers.engine.admission import objection
from segue.workers.engine.coalescing import RequestCoalescer
from segue.workers.engine.decode_graphs import DecodeGraphs
from segue.workers.engine.scheduler import Prefill, Scheduler, StepPlan
from segue.workers.engine.stats import EngineStats
from segue.workers.errors import RowError, RowErrorCode
from segue.workers.models.tree_model import TreeModel
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import GenerationRequest, Request, RequestOutput, Sample, Score, ScoringRequest
from segue.workers.sampling.draw import draw
from segue.workers.sampling.ending import Finisher
from segue.workers.sampling.grammars import Grammars
from segue.workers.scoring.likelihood import TokenScore, collect, score_step

ENOUGH_KV_BYTES = 1 << 30  # however long the model's context is
SHRUNK_SHARE = 0.75  # of its KV memory, what an engine keeps if its steps do not fit beside it
LEAST_KV_SHARE = 0.1
SCORING = SamplingParams(max_tokens=1)  # of rows that draw nothing


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine runs; nothing here changes an answer, except `mask` and `seed`."""

    mask: Literal["segment", "causal"] = "causal"
    seed: int = 0
    max_model_len: int | None = None  # tokens a row, prompt and answer; at most the model's own
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_memory_bytes: int | None = None  # None: a share of what is free once the model is loaded
    kv_memory_share: float | None = None  # see segue.workers.devices.devices.kv_memory_bytes
    enable_prefix_caching: bool = True
    backend: BackendName = "auto"
    decode_graphs: bool = False  # CUDA graphs for steps of generating rows alone; a capture for each size that comes up


class _ForwardOutOfMemory(Exception):
    """A step of so many tokens found no memory."""

    def __init__(self, num_tokens: int, message: str) -> None:
        super().__init__(message)
        self.num_tokens = num_tokens


class EngineCore:
    """One model on one device, driven by `add` and `step`."""

    def __init__(self, model: TreeModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config or EngineConfig()
        self.max_model_len = min(self.config.max_model_len or model.max_model_len, model.max_model_len)
        self.tree = SegmentTree()
        kv_bytes = self.config.kv_cache_memory_bytes or self._measured_kv_bytes()
        self.backend = make_backend(self.config.backend, model.kv_shape, model.layer_devices)
        self.cache = self.backend.new_memory(model.kv_shape, kv_bytes)
        self.graphs = self._decode_graphs() if self.config.decode_graphs else None
        self._least_kv_bytes = int(kv_bytes * LEAST_KV_SHARE)
        self.scheduler = Scheduler(
            self.tree,
            self.cache,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            keep_idle=self.config.enable_prefix_caching,
        )
        self.finisher = Finisher(model.tokenizer, model.eos_token_ids, self.max_model_len)
        self.stats = EngineStats()
        self._coalescer = RequestCoalescer()
        self.grammars = Grammars(model.tokenizer, model.vocab_size, model.eos_token_ids)
        self._num_added = 0
        self._refused: list[RequestOutput] = []

    def _decode_graphs(self) -> DecodeGraphs:
        if not isinstance(self.backend, VarlenBackend) or not isinstance(self.cache, KVPool):
            raise ValueError("decode_graphs wants the backend varlen")
        if len({*self.model.layer_devices}) > 1:
            raise ValueError("decode_graphs wants all layers on one device")
        return DecodeGraphs(self.model, self.cache, self.backend.kernel)

    def _measured_kv_bytes(self) -> int:
        """A share of what is free now. Raises MemoryError if rows would fail for it that are nothing special."""
        share, explained = kv_memory_bytes(self.model.layer_devices, self.config.kv_memory_share)
        wanted = min(self.max_model_len * self.model.kv_shape.bytes_per_token, ENOUGH_KV_BYTES)
        if share < wanted:
            raise MemoryError(
                f"{share:,} bytes of memory are there for keys and values ({explained}), wanted {wanted:,}; "
                "free some, or say workers.kv_cache_memory_bytes"
            )
        return share

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.has_work or self._refused)

    def add(self, request_id: Hashable, row: GenerationRequest | ScoringRequest) -> None:
        """Queue a row. One that cannot run becomes an output with `error`, like any other row error.

        Of a continuation to score all tokens but the last are fed, so it and its context may together be one longer
        than `max_model_len`; both need at least one token. What no other row begins with is forgotten when scored.
        """
        config = self.config
        if isinstance(row, ScoringRequest):
            root = None if config.enable_prefix_caching and row.is_shared else self.tree.new_root()
            chain = canonical_segments(row.context, mask=config.mask)
            self._queue(Request(request_id, chain, SCORING, b"", self._num_added, root, tuple(row.continuation)))
        else:
            root = None if config.enable_prefix_caching else self.tree.new_root()
            chain = canonical_segments(row.segments, mask=config.mask)
            self._queue(Request(request_id, chain, row.params, row.random_key, self._num_added, root))

    def _queue(self, request: Request) -> None:
        self._num_added += 1
        self.stats.num_rows += 1
        self.stats.num_prompt_tokens += request.num_fed_tokens
        error = objection(request, self.max_model_len, self.grammars)
        if error:
            self._refused.append(self._failed_output(request, error))
        elif not (self.config.enable_prefix_caching and self._coalescer.joins(request)):
            self.scheduler.add(request)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """One forward pass; returns the rows that finished with it."""
        done, self._refused = self._refused, []
        plan = self.scheduler.plan_step()
        done += self._take_failed()
        if not plan.is_empty:
            try:
                decode_hidden, last_scores = self._compute(plan)
            except _ForwardOutOfMemory as error:
                self._make_smaller(error)  # what was planned is planned again
            else:
                done += self._score(plan, last_scores)
                done += self._draw(plan, decode_hidden)
                self._count(plan)
        done = list(self._coalescer.answers(done))
        self.stats.num_errors += sum(output.error is not None for output in done)
        self.stats.num_finished_rows += len(done)
        self.stats.num_finished_tokens += sum(output.num_prompt_tokens for output in done)
        self._look()
        return done

    def _compute(self, plan: StepPlan) -> tuple[Tensor, list[TokenScore]]:
        """Run the model over the step.

        Returns the hidden states of the decoding samples, `[B, E]`, and the scores of the last tokens of `plan.scored`.
        """
        decode = [DecodeQuery(s.end, s.token_ids[-1], s.end.stop + _tail_length(s)) for s in plan.decoding]
        blocks = blocks_of(plan.new_nodes, decode)
        hidden = torch.empty(0)
        if blocks.num_tokens:
            tails = [sample.tail for sample in plan.decoding if sample.tail is not None]
            hidden = self._forward(blocks, tails)
            _keep_node_ends(blocks, hidden)
            for tail in tails:
                tail.length += 1
        ends = [(prefill.end, _continuation(prefill.request)[-1]) for prefill in plan.scored]
        scores, num_states = score_step(
            blocks.self_blocks, ends, hidden, self.model.rounded_logits, self.model.vocab_size
        )
        self.stats.num_scored_positions += num_states
        return (hidden[torch.tensor(blocks.decode_index, device=hidden.device)] if decode else hidden[:0]), scores

    def _forward(self, blocks: StepBlocks, tails: Sequence[Tail]) -> Tensor:
        """Raises _ForwardOutOfMemory: then nothing is computed, and nothing is lost."""
        try:
            if self.graphs is not None and not blocks.self_blocks:
                return self.graphs.forward(blocks, tails)
            return self.model.forward(TreeStep(blocks, tails, self.cache, self.backend))
        except torch.OutOfMemoryError as error:
            raise _ForwardOutOfMemory(blocks.num_tokens, str(error)) from None

    def _make_smaller(self, error: "_ForwardOutOfMemory") -> None:
        """After a step for which the device had no memory: smaller steps, and if they cannot be, less KV memory.

        Raises torch.OutOfMemoryError if that does not help either.
        """
        if self.model.kv_shape.device.type == "cuda":
            torch.cuda.empty_cache()
        self.stats.num_shrunk_steps += 1
        scheduler = self.scheduler
        smaller = max(error.num_tokens // 2, scheduler.max_num_seqs)
        if smaller < min(error.num_tokens, scheduler.max_num_batched_tokens):
            scheduler.max_num_batched_tokens = smaller
            return
        budget = int(self.cache.budget_bytes * SHRUNK_SHARE)
        if budget < self._least_kv_bytes or not scheduler.shrink_memory(budget):
            raise torch.OutOfMemoryError(f"a step of {error.num_tokens} tokens does not fit: {error}")

    def _score(self, plan: StepPlan, last_scores: Sequence[TokenScore]) -> list[RequestOutput]:
        """Finish the scoring rows whose last fed token is computed."""
        return [self._scored(*each) for each in zip(plan.scored, last_scores, strict=True)]

    def _scored(self, prefill: Prefill, last: TokenScore) -> RequestOutput:
        request = prefill.request
        logprob, is_greedy = collect(prefill.end, request.num_prompt_tokens)
        score = Score(logprob + last[0], len(_continuation(request)), is_greedy and last[1])
        if not math.isfinite(score.logprob):
            self._discard(request)
            return self._failed_output(request, _numeric_error())
        prefill.samples[0].finish_reason = "stop"
        self.scheduler.start_decoding(prefill)
        return request.output(num_cached_tokens=request.num_cached_tokens or 0, score=score)

    def _draw(self, plan: StepPlan, decode_hidden: Tensor) -> list[RequestOutput]:
        """Next tokens for decoding samples and first tokens for completed prompts."""
        samples = [*plan.decoding, *(sample for prefill in plan.ready for sample in prefill.samples)]
        if not samples:
            return []
        for sample in samples:
            self._begin_form(sample)
        ends = [last_hidden(prefill) for prefill in plan.ready for _ in prefill.samples]
        hidden = torch.stack(ends) if not plan.decoding else torch.cat([decode_hidden, *(e[None] for e in ends)])
        logits = self.model.rounded_logits(hidden)
        tokens = draw(logits, samples, seed=self.config.seed, eos_token_ids=self.model.eos_token_ids)
        broken: dict[Request, RowError] = {}
        for sample, token in zip(samples, tokens, strict=True):
            error = self._append(sample, token)
            if error is not None:
                broken[sample.request] = error
        return self._settle(plan, broken)

    def _append(self, sample: Sample, token: int | None) -> RowError | None:
        """The token that was drawn; or why the row has no answer."""
        if token is None:
            return _numeric_error()
        if sample.grammar is not None and (error := sample.grammar.accept(token)):
            return error
        self.finisher.append(sample, token)
        self.stats.num_generated_tokens += 1
        return None

    def _begin_form(self, sample: Sample) -> None:
        """A sample that was preempted has its grammar already."""
        outputs = sample.request.params.structured_outputs
        if outputs is not None and sample.grammar is None:
            sample.grammar = self.grammars.begin(outputs)

    def _settle(self, plan: StepPlan, broken: Mapping[Request, RowError]) -> list[RequestOutput]:
        """Move samples on: finished ones out, new ones to decoding, rows without an answer to their error."""
        requests = dict.fromkeys([*(s.request for s in plan.decoding), *(p.request for p in plan.ready)])
        outputs = []
        for request, error in broken.items():
            self._discard(request)
            outputs.append(self._failed_output(request, error))
        for prefill in plan.ready:
            if prefill.request not in broken:
                self.scheduler.start_decoding(prefill)
        for sample in plan.decoding:
            if sample.finish_reason and sample.request not in broken:
                self.scheduler.finish(sample)
        finished = [r for r in requests if r not in broken and r.is_finished]
        return outputs + [self._output(request) for request in finished]

    def _discard(self, request: Request) -> None:
        ends = {sample.copied or sample.end for sample in request.samples}
        self.scheduler.abort(request)
        for end in ends:
            self.scheduler.residency.discard(end)

    def _take_failed(self) -> list[RequestOutput]:
        failed, self.scheduler.failed = self.scheduler.failed, []
        for request, _ in failed:
            self.scheduler.abort(request)
        return [self._failed_output(request, error) for request, error in failed]

    def _output(self, request: Request) -> RequestOutput:
        outputs = [self.finisher.output(sample) for sample in request.samples]
        return request.output(num_cached_tokens=request.num_cached_tokens or 0, outputs=outputs)

    def _failed_output(self, request: Request, error: RowError) -> RequestOutput:
        return request.output(error=error)

    def _count(self, plan: StepPlan) -> None:
        self.stats.num_steps += 1
        self.stats.num_computed_tokens += sum(len(node) for node in plan.new_nodes)
        if plan.decoding:
            self.stats.num_decode_slots += self.config.max_num_seqs
            self.stats.num_empty_slots += max(0, self.config.max_num_seqs - len(plan.decoding))
        self.stats.num_preemptions = self.scheduler.num_preemptions
        self.stats.max_kv_bytes = max(self.stats.max_kv_bytes, self.cache.allocated_bytes)

    def _look(self) -> None:
        """At the engine's state, for those who watch."""
        self.stats.num_running, self.stats.num_waiting = self.scheduler.num_active, len(self.scheduler.waiting)
        self.stats.kv_bytes, self.stats.kv_capacity_bytes = self.cache.allocated_bytes, self.cache.budget_bytes


def _numeric_error() -> RowError:
    return RowError(RowErrorCode.NUMERIC_ERROR, "the model gave logits that are not finite numbers")


def _continuation(request: Request) -> tuple[int, ...]:
    if request.continuation is None:
        raise ValueError("a row that is scored has a continuation")
    return request.continuation


def _tail_length(sample: Sample) -> int:
    return sample.tail.length if sample.tail is not None else 0


def _keep_node_ends(blocks: StepBlocks, hidden: Tensor) -> None:
    """Copies, so that the step's other hidden states are freed."""
    ends = torch.tensor([block.stop - 1 for block in blocks.self_blocks], dtype=torch.long, device=hidden.device)
    for block, end in zip(blocks.self_blocks, hidden[ends].unbind(), strict=True):
        block.node.is_computed = True
        block.node.last_hidden = end


def last_hidden(prefill: Prefill) -> Tensor:
    """`[E]`, after the prompt's last token. Raises ValueError if it is not computed."""
    hidden = prefill.end.last_hidden
    if not isinstance(hidden, Tensor):
        raise ValueError("a prompt is called complete, but the hidden state of its last token is missing")
    return hidden
