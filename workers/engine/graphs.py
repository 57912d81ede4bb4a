"""CUDA graphs for steps in which all rows decode: one call starts the thousands of kernels of a step.

A graph is captured for each bucket of sizes that comes up. Later steps of that bucket put their numbers into its
tensors and replay it. On a CPU the same padded step runs without a graph; tests use that. Knows the model and the
pool; no rows.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from segue.attention.cuda.backend import Kernel
from segue.attention.cuda.decode_batch import DecodeBucket, PaddedDecode
from segue.attention.cuda.plan import CudaPlan
from segue.attention.memory.budget import Tail
from segue.attention.memory.pool import KVPool
from segue.attention.tree.blocks import StepBlocks
from segue.workers.models.tree_model import TreeModel

MAX_GRAPHS = 48  # the least recently used one goes
WARM_UP_RUNS = 2  # before a capture: libraries initialise themselves in their first calls


class DecodeGraphs:
    """The graphs of one engine. All layers must be on one device."""

    def __init__(self, model: TreeModel, pool: KVPool, kernel: Kernel) -> None:
        self._model = model
        self._pool = pool
        self._kernel = kernel
        self._graphs: OrderedDict[DecodeBucket, _Graph] = OrderedDict()
        self._generation = pool.generation
        self.num_captures = 0

    def forward(self, blocks: StepBlocks, tails: Sequence[Tail]) -> Tensor:
        """The final hidden states of the rows' tokens, `[T, E]`: valid until the next call."""
        if self._generation != self._pool.generation:  # its tensors are gone
            self._graphs.clear()
            self._generation = self._pool.generation
        plan = CudaPlan.of(blocks, tails)
        bucket = DecodeBucket.of(plan)
        graph = self._graphs.pop(bucket, None)
        if graph is None:
            if len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
            graph = _Graph(self._model, bucket, PaddedDecode(bucket, self._pool, self._kernel))
            self.num_captures += 1
        self._graphs[bucket] = graph
        return graph.run(plan, blocks.token_ids, blocks.position_ids)


class _Graph:
    """The graph of one bucket."""

    def __init__(self, model: TreeModel, bucket: DecodeBucket, step: PaddedDecode) -> None:
        device = model.kv_shape.device
        self._step = step
        self._ids = torch.zeros(1, bucket.rows, dtype=torch.long, device=device)
        self._positions = torch.zeros(1, bucket.rows, dtype=torch.long, device=device)
        self._hidden = torch.empty(0)
        self._replay = self._captured(model, device)

    def run(self, plan: CudaPlan, token_ids: Sequence[int], position_ids: Sequence[int]) -> Tensor:
        for tensor, values in ((self._ids, token_ids), (self._positions, position_ids)):
            padded = np.zeros((1, tensor.shape[1]), dtype=np.int64)
            padded[0, : len(values)] = values
            tensor.copy_(torch.from_numpy(padded), non_blocking=True)
        self._step.load(plan)
        self._replay()
        return self._hidden[: len(token_ids)]

    @torch.inference_mode()
    def _captured(self, model: TreeModel, device: torch.device) -> Callable[[], None]:
        def once() -> None:
            self._hidden = model.hidden(self._ids, self._positions, self._step)

        if device.type != "cuda":
            return once
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                once()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        return graph.replay
