"""Exceptions at any line of the engine leave it as it was: the next call's answers equal a fresh engine's."""

import pytest
import torch
from interrupts import interrupted
from tiny_engines import memory_of, shared_prompts, steps_to_the_end, tiny_engine, token_ids

from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import GenerationRequest

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, n=2, temperature=0.8)
TIGHT = {"max_num_seqs": 6, "max_num_batched_tokens": 64}
LINES = [int(1.62**power) for power in range(1, 21)]  # 1 to 15,000 of the 17,000 lines of a call


@pytest.fixture(scope="module", autouse=True)
def _over_each_backend(each_backend):
    """The memory of each is another."""


@pytest.fixture(scope="module")
def wanted(each_backend):
    return token_ids(tiny_engine(**TIGHT).generate(shared_prompts(5, seed=2), PARAMS))


def take_all(engine, outputs):
    while engine.has_work:
        outputs += engine.step()


@pytest.mark.parametrize("at_line", LINES)
def test_generate_after_a_ctrl_c_at_any_line_of_the_call_before_answers_as_a_fresh_engine(at_line, wanted):
    subject = tiny_engine(**TIGHT)
    with pytest.raises(KeyboardInterrupt), interrupted(at_line, KeyboardInterrupt()):
        subject.generate(shared_prompts(5, seed=1), PARAMS)
    assert token_ids(subject.generate(shared_prompts(5, seed=2), PARAMS)) == wanted
    assert not subject.has_work
    subject.core.nodes.make_room(memory_of(subject).budget_tokens)
    assert memory_of(subject).allocated_bytes == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a device that fails"), MemoryError()], ids=repr)
@pytest.mark.parametrize("at_line", LINES[::3])
def test_rows_in_flight_are_answered_once_although_steps_were_interrupted(at_line, error, wanted):
    subject = tiny_engine(**TIGHT)
    for index, prompt in enumerate(shared_prompts(5, seed=2)):
        subject.add(index, GenerationRequest(prompt, PARAMS, str(index).encode()))
    outputs = subject.step()
    with pytest.raises(type(error)), interrupted(at_line, error):
        take_all(subject, outputs)
    take_all(subject, outputs)
    assert len(outputs) == 5
    of_row = {output.request_id: output for output in outputs}
    assert token_ids([of_row[index] for index in range(5)]) == wanted


def test_counters_of_rows_count_a_row_once_although_it_was_computed_twice():
    subject = tiny_engine(**TIGHT)
    for index, prompt in enumerate(shared_prompts(5)):
        subject.add(index, GenerationRequest(prompt, PARAMS, b""))
    with pytest.raises(torch.AcceleratorError), interrupted(900, torch.AcceleratorError("device lost")):
        steps_to_the_end(subject)
    steps_to_the_end(subject)
    assert (subject.stats.num_rows, subject.stats.num_finished_rows, subject.stats.num_errors) == (5, 5, 0)
