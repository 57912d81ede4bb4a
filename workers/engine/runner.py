"""Computes steps: one model on its devices, with the memory for its keys and values.

The core says what a step computes (`StepPlan`); the runner runs the model, keeps what was computed in the tree's nodes,
and gives back logits and scores (`StepResult`). Knows no queues, no parameters of rows and no answers.

Shapes: `T` packed tokens, `B` samples that draw, `E` hidden width, `V` vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from segue.attention.cuda.backend import CudaBackend
from segue.attention.memory.budget import Tail
from segue.attention.memory.pool import KVPool
from segue.attention.tree.blocks import DecodeQuery, StepBlocks, blocks_of
from segue.attention.tree.cache import NodeCache
from segue.workers.devices.devices import kv_memory_bytes, make_backend
from segue.workers.engine.config import EngineConfig
from segue.workers.engine.graphs import DecodeGraphs
from segue.workers.engine.plan import Prefill, StepPlan, StepResult, StepTooLarge
from segue.workers.models.support import layer_windows
from segue.workers.models.tree_model import TreeModel
from segue.workers.sampling.sample import Sample
from segue.workers.scoring.likelihood import StepScores, last_hidden, score_step

ENOUGH_KV_BYTES = 1 << 30  # however long the model's context is


class StepRunner:
    """Runs the model over planned steps. Raises MemoryError if there is too little memory for ordinary rows."""

    def __init__(self, model: TreeModel, config: EngineConfig, max_model_len: int) -> None:
        self.model = model
        kv_bytes = config.kv_cache_memory_bytes or _measured_kv_bytes(model, max_model_len, config.kv_memory_share)
        self.backend = make_backend(config.backend, model.kv_shape, model.layer_devices)
        self.memory = self.backend.new_memory(model.kv_shape, kv_bytes)
        self.nodes = NodeCache(self.memory, keep_idle=config.enable_prefix_caching)
        self.graphs = self._decode_graphs() if config.decode_graphs else None

    def _decode_graphs(self) -> DecodeGraphs:
        if not isinstance(self.backend, CudaBackend) or not isinstance(self.memory, KVPool):
            raise ValueError("decode_graphs wants the backend varlen")
        if len({*self.model.layer_devices}) > 1:
            raise ValueError("decode_graphs wants all layers on one device")
        if any(layer_windows(self.model.model.config)) or self.model.long_rope is not None:
            raise ValueError("decode_graphs wants a model without sliding windows and without longrope positions")
        return DecodeGraphs(self.model, self.memory, self.backend.kernel)

    def run(self, plan: StepPlan) -> StepResult | StepTooLarge:
        """Compute a step. New nodes are computed then, and the tail of each decoding sample is one token longer."""
        blocks = blocks_of(plan.new_nodes, [_query_of(sample) for sample in plan.decoding])
        tails = [sample.tail for sample in plan.decoding if sample.tail is not None]
        hidden = self._forward(blocks, tails) if blocks.num_tokens else torch.empty(0)
        if isinstance(hidden, StepTooLarge):
            self._release_cached_memory()
            return hidden
        self._keep(blocks, hidden, tails)
        scores = self._score(plan, blocks, hidden)
        return StepResult(
            logits=self._logits(plan, hidden, blocks.decode_index),
            last_scores=scores.of_ends,
            prompt_logits=[self._prompt_logits(prefill) for prefill in plan.with_logits],
            num_scored_positions=scores.num_states,
        )

    def _forward(self, blocks: StepBlocks, tails: Sequence[Tail]) -> Tensor | StepTooLarge:
        """`[T, E]`."""
        try:
            if self.graphs is not None and not blocks.self_blocks:
                return self.graphs.forward(blocks, tails)
            return self.model.forward(blocks, self.backend.begin(blocks, tails, self.memory))
        except torch.OutOfMemoryError as error:
            return StepTooLarge(str(error))

    def _release_cached_memory(self) -> None:
        """Not inside the `except` block: until its end, the error holds the tensors of the failed step."""
        if self.model.kv_shape.device.type == "cuda":
            torch.cuda.empty_cache()

    def _keep(self, blocks: StepBlocks, hidden: Tensor, tails: Sequence[Tail]) -> None:
        """Node by node a copy of the last hidden state, so that the step's other hidden states are freed."""
        ends = torch.tensor([block.stop - 1 for block in blocks.self_blocks], dtype=torch.long, device=hidden.device)
        for block, end in zip(blocks.self_blocks, hidden[ends].unbind(), strict=True):
            self.nodes.keep_computed(block.node, end)
        for tail in tails:
            tail.length += 1

    def _score(self, plan: StepPlan, blocks: StepBlocks, hidden: Tensor) -> StepScores:
        ends = [(prefill.end, prefill.request.last_continuation_token) for prefill in plan.scored]
        scores = score_step(blocks.self_blocks, ends, hidden, self.model.rounded_logits, self.model.vocab_size)
        for node, of_node in scores.of_nodes:
            self.nodes.keep_scores(node, of_node)
        return scores

    def _logits(self, plan: StepPlan, hidden: Tensor, decode_index: Sequence[int]) -> Tensor | None:
        """`[B, V]`, of `plan.drawing`."""
        states = [last_hidden(prefill.end)[None] for prefill in plan.ready for _ in prefill.samples]
        if plan.decoding:
            states.insert(0, hidden[torch.tensor(decode_index, device=hidden.device)])
        return self.model.rounded_logits(torch.cat(states)) if states else None

    def _prompt_logits(self, prefill: Prefill) -> Tensor:
        """`[V]` fp32. One prompt at a time: the numbers do not depend on what else is in the step."""
        return self.model.logits(last_hidden(prefill.end)[None])[0]


def _query_of(sample: Sample) -> DecodeQuery:
    num_generated = sample.tail.length if sample.tail is not None else 0
    return DecodeQuery(sample.end, sample.token_ids[-1], sample.end.stop + num_generated)


def _measured_kv_bytes(model: TreeModel, max_model_len: int, wanted_share: float | None) -> int:
    """A share of what is free now. Raises MemoryError if ordinary rows would fail for want of memory."""
    share, explained = kv_memory_bytes(model.layer_devices, wanted_share)
    wanted = min(max_model_len * model.kv_shape.bytes_per_token, ENOUGH_KV_BYTES)
    if share < wanted:
        raise MemoryError(
            f"{share:,} bytes of memory are there for keys and values ({explained}), wanted {wanted:,}; "
            "free some, or say workers.kv_cache_memory_bytes"
        )
    return share
