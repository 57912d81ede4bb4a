"""The thread that drives an engine gives each row of a batch its own answer, once."""

import pytest

from segue.attention.segments import Segment
from segue.workers.engine.echo import EchoEngine
from segue.workers.engine.loop import EngineLoop
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import GenerationRequest

ROWS = [
    GenerationRequest([Segment(tuple(text), False)], SamplingParams(max_tokens=3), b"")
    for text in (b"one", b"two", b"six")
]


class StutteringEngine(EchoEngine):
    def step(self):
        return [output for output in super().step() for _ in range(2)]


def test_batches_are_answered_in_the_order_of_their_rows():
    loop = EngineLoop(EchoEngine)
    batches = [loop.submit(rows) for rows in (ROWS, ROWS[::-1], [])]
    texts = [[output.prompt_token_ids for output in batch.result(timeout=60)] for batch in batches]
    assert texts == [[list(b"one"), list(b"two"), list(b"six")], [list(b"six"), list(b"two"), list(b"one")], []]
    loop.stop()


def test_engine_that_answers_a_row_twice_fails_its_batch_instead_of_shifting_answers():
    batch = EngineLoop(StutteringEngine).submit(ROWS)
    with pytest.raises(RuntimeError, match="row 0 of a batch twice"):
        batch.result(timeout=60)
