"""Drives engines through random schedules, and checks each answer against the row's answer alone."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Self
from unittest.mock import patch

from interrupts import interrupted
from random_schedules import ERRORS, Row, Schedule, schedule_of
from schedule_answers import Alone
from tiny_engines import BACKENDS, over_backend
from tiny_models import tiny_tree_model

from segue.attention.memory.pool import KVPool
from segue.attention.tree.node import Node
from segue.workers.engine.config import EngineConfig
from segue.workers.engine.core import EngineCore
from segue.workers.models.tree_model import TreeModel
from segue.workers.rows.request import RequestOutput

MAX_STEPS = 5000  # of a schedule that ends
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class SchedulesOver:
    """Schedules over one backend. A seed names its backend, too."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(over_backend(self._backend))
        self._model = tiny_tree_model("llama", **SMALL)
        self._alone = Alone(self._model)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def own(self, seeds: Iterable[int]) -> list[int]:
        """Those of the seeds whose schedules run over this backend."""
        return [seed for seed in seeds if BACKENDS[seed % len(BACKENDS)] == self._backend]

    def check(self, seed: int) -> None:
        """Raises AssertionError, with the schedule, if a row is lost, answered twice or otherwise than alone, if memory
        is not given back, or if an exception comes out that the schedule did not put in."""
        schedule = schedule_of(seed)
        try:
            run_schedule(schedule, self._model, self._alone)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{schedule}") from error


def run_schedule(schedule: Schedule, model: TreeModel, alone: Alone) -> None:
    """One engine through one schedule."""
    with (
        patch("segue.attention.tree.cache.UNSHARED_TOKENS", schedule.unshared_tokens),
        patch("segue.attention.tree.cache.UNSHARED_SHARE", 1 / 32 if schedule.unshared_tokens > 30 else 0.0),
        patch("segue.workers.engine.scheduler.MIN_PIECE_TOKENS", schedule.min_piece_tokens),
    ):
        run = _Run(schedule, model)
        run.to_the_end()
        for index, output in run.outputs.items():
            alone.check(schedule.rows[index], output, run.config)
        check_idle(run.core)


class _Run:
    """One engine on its way through a schedule."""

    def __init__(self, schedule: Schedule, model: TreeModel) -> None:
        self.schedule = schedule
        budget = schedule.budget_tokens * model.kv_shape.bytes_per_token
        self.config = EngineConfig(**schedule.config, kv_cache_memory_bytes=budget)  # type: ignore[arg-type]
        self.core = EngineCore(model, self.config)
        self.outputs: dict[int, RequestOutput] = {}
        self._gone: set[int] = set()
        self._step = 0

    def to_the_end(self) -> None:
        last = max(*self.schedule.arrivals, 30)
        while self._step <= last or self.core.has_work:
            assert self._step < MAX_STEPS, "the engine does not come to an end"
            self._one_step()
            check_memory(self.core)
            self._step += 1
        wanted = {*range(len(self.schedule.rows))}
        assert {*self.outputs} | self._gone == wanted, f"without an answer: {wanted - {*self.outputs} - self._gone}"

    def _one_step(self) -> None:
        for index, row in enumerate(self.schedule.rows):
            if self.schedule.arrivals[index] == self._step:
                self._add(index, row)
        unwanted = {index for index in self.schedule.aborts.get(self._step, ()) if self._has_come(index)}
        if unwanted:
            if self._interrupts("abort", lambda: self.core.abort(unwanted)):
                self.core.abort(unwanted)
            self._gone |= unwanted - {*self.outputs}
        self._interrupts("step", lambda: self._deliver(self.core.step()))

    def _has_come(self, index: int) -> bool:
        return self.schedule.arrivals[index] <= self._step

    def _add(self, index: int, row: Row) -> None:
        if self._interrupts("add", lambda: self.core.add(index, row)):
            self.core.abort({index})
            self.core.add(index, row)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            index = output.request_id
            assert isinstance(index, int)
            assert index not in self._gone, f"row {index} was aborted, and is answered"
            assert index not in self.outputs, f"row {index} is answered twice"
            self.outputs[index] = output

    def _interrupts(self, name: str, call: Callable[[], None]) -> bool:
        """Make a call; whether the exception that the schedule wants there came out of it."""
        wanted = self.schedule.interrupts.get(self._step)
        if wanted is None or wanted.call != name:
            call()
            return False
        error = ERRORS[wanted.error]()
        try:
            with interrupted(wanted.at_line, error):
                call()
        except BaseException as found:
            if found is not error:
                raise
            return True
        return False


def check_memory(core: EngineCore) -> None:
    """What is allocated is what nodes and tails have, and within the budget. Not after an exception: it may be torn."""
    if core._is_changing:
        return
    memory, queues = core.runner.memory, core.scheduler._queues
    nodes: dict[Node, None] = dict.fromkeys(core.nodes)
    for end in [*(p.end for p in (*queues.waiting, *queues.prefilling)), *(s.end for s in queues.running)]:
        nodes |= dict.fromkeys(end.path())
    nodes |= dict.fromkeys(core.nodes._idle)
    of_nodes = sum(node.kv.num_bytes for node in nodes if node.kv is not None)
    of_tails = sum(memory.bytes_for(sample.tail.capacity) for sample in queues.running if sample.tail is not None)
    assert memory.allocated_bytes == of_nodes + of_tails <= memory.budget_bytes
    assert all(len(node) * memory.shape.bytes_per_token == node.kv.num_bytes for node in nodes if node.kv is not None)
    if isinstance(memory, KVPool):
        used = memory._extents.size - memory._extents.num_free
        assert memory.bytes_for(used) == memory.allocated_bytes


def check_idle(core: EngineCore) -> None:
    """An engine without rows holds idle nodes alone, and gives them all back when it must."""
    core._begin()
    for node in core.nodes:
        assert (node.num_rows, node.num_active, node.num_scoring) == (0, 0, 0)
    core.nodes.make_room(core.runner.memory.budget_tokens)
    assert core.runner.memory.allocated_bytes == 0
    assert list(core.nodes) == []
