"""Engines over the tiny model, rows that share much, and the backends that engine tests run over."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tiny_models import tiny_tree_model
from varlen_emulation import emulate

from segue.attention.memory.budget import KVMemory
from segue.attention.segments import Segment
from segue.workers.engine.core import EngineCore
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.rows.request import GenerationRequest, RequestOutput

BACKENDS = ["kernels", "torch", "varlen"]  # the last is the GPU's, with an emulated kernel


@contextmanager
def over_backend(name: str) -> Iterator[None]:
    """What "auto" chooses on a CPU is this backend. Kernels are there only where a compiler is."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "torch":
            patch.setenv("SEGUE_CPU_KERNELS", "0")
        if name == "varlen":
            emulate(patch)
        tiny_tree_model.cache_clear()  # a model keeps the kernels that it found when it was made
        yield
    tiny_tree_model.cache_clear()


def tiny_engine(**config: Any) -> Engine:
    return Engine(tiny_tree_model(), EngineConfig(**{"mask": "segment", **config}))


def memory_of(engine: Engine) -> KVMemory:
    return engine.core.runner.memory


def kv_bytes(num_tokens: int) -> int:
    """Of so many tokens of the tiny model."""
    return num_tokens * tiny_tree_model().kv_shape.bytes_per_token


def shared_prompts(num_rows: int = 12, seed: int = 0) -> list[list[Segment]]:
    """Rows over two systems, three documents and own questions of different lengths."""
    rng = random.Random(seed)
    systems = [Segment(tuple(rng.randrange(3, 250) for _ in range(30)), True) for _ in range(2)]
    documents = [Segment(tuple(rng.randrange(3, 250) for _ in range(20)), True) for _ in range(3)]
    rows = []
    for index in range(num_rows):
        question = Segment(tuple(rng.randrange(3, 250) for _ in range(rng.randrange(1, 15))), True)
        header = Segment((9, 8), False)
        rows.append([systems[index % 2], documents[index % 3], question, header])
    return rows


def token_ids(outputs: Iterable[RequestOutput]) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def steps_to_the_end(engine: Engine | EngineCore) -> list[RequestOutput]:
    """The outputs of all rows that were added, as they came."""
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def run_with_keys(engine: Engine, rows: Any, keys: Any, params: Any) -> list[list[list[int]]]:
    """Token ids of rows that are named by `keys` for their draws."""
    for index, (row, key) in enumerate(zip(rows, keys, strict=True)):
        engine.add(index, GenerationRequest(row, params, key))
    outputs = {output.request_id: output for output in steps_to_the_end(engine)}
    return token_ids([outputs[index] for index in range(len(rows))])
