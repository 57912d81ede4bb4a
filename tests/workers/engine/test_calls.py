"""Calls of one engine after and beside each other: each gets its own answers, also after one that was interrupted."""

import pytest
import torch
from tiny_engines import shared_prompts, steps_to_the_end, tiny_engine, token_ids
from tiny_models import oracle_logits, oracle_model

from segue.attention.segments import Segment
from segue.workers.engine.core import EngineCore
from segue.workers.errors import RowError
from segue.workers.models.tree_model import TreeModel
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import GenerationRequest, ScoringRequest

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
PROMPT = [Segment(tuple(range(3, 30)), True), Segment((9, 8), False)]
CALLS = {
    "generate": lambda engine, prompts: engine.generate(prompts, PARAMS),
    "logits": lambda engine, prompts: engine.logits(prompts),
    "loglikelihood": lambda engine, prompts: engine.loglikelihood([(prompt, (5, 6, 7)) for prompt in prompts]),
}


def interrupt(monkeypatch, at_step, error):
    """Raise `error` in one forward pass; the passes after it are as ever."""
    forward = TreeModel.forward
    steps = []

    def interrupted(self, blocks, run):
        steps.append(blocks)
        if len(steps) == at_step:
            raise error
        return forward(self, blocks, run)

    monkeypatch.setattr(TreeModel, "forward", interrupted)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a device that fails")], ids=["ctrl-c", "failure"])
@pytest.mark.parametrize("name", CALLS)
def test_call_after_an_interrupted_one_gets_the_answers_of_its_own_prompts(name, error, monkeypatch):
    first, second = shared_prompts(12, seed=1), shared_prompts(12, seed=2)
    subject = tiny_engine(max_num_seqs=4, max_num_batched_tokens=64)
    interrupt(monkeypatch, 3, error)
    with pytest.raises(type(error)):
        CALLS[name](subject, first)
    assert not subject.has_work
    fresh = tiny_engine(max_num_seqs=4, max_num_batched_tokens=64)
    assert token_ids(subject.generate(second, PARAMS)) == token_ids(fresh.generate(second, PARAMS))
    for got, prompt in zip(subject.logits(second), second, strict=True):
        torch.testing.assert_close(got, oracle_logits(oracle_model(), prompt)[-1], atol=1e-4, rtol=0)


def test_interrupted_calls_hold_no_memory(monkeypatch):
    subject = tiny_engine(enable_prefix_caching=False, max_num_seqs=4)
    interrupt(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        subject.generate(shared_prompts(), PARAMS)
    assert subject.core.runner.memory.allocated_bytes == 0
    assert list(subject.core.nodes) == []


@pytest.mark.parametrize("name", CALLS)
def test_call_beside_rows_in_flight_ends_and_their_answers_come_with_the_next_step(name):
    subject = tiny_engine()
    subject.add("in flight", GenerationRequest(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True), b"key"))
    subject.step()
    prompts = shared_prompts(12)
    got, wanted = (CALLS[name](engine, prompts) for engine in (subject, tiny_engine()))
    if name == "generate":
        assert token_ids(got) == token_ids(wanted)
    elif name == "logits":
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    else:
        assert [score.logprob for score in got] == pytest.approx([score.logprob for score in wanted], abs=1e-3)
    (output,) = steps_to_the_end(subject)
    assert output.request_id == "in flight"
    alone = tiny_engine().generate([PROMPT], SamplingParams(max_tokens=3, ignore_eos=True))
    assert token_ids([output]) == token_ids(alone)


def test_interrupted_call_takes_no_answer_from_an_equal_row_in_flight(monkeypatch):
    subject = tiny_engine()
    subject.add("in flight", GenerationRequest(PROMPT, PARAMS, b"key"))
    interrupt(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        subject.generate([PROMPT, PROMPT], PARAMS)
    (output,) = steps_to_the_end(subject)
    assert output.request_id == "in flight"
    assert token_ids([output]) == token_ids(tiny_engine().generate([PROMPT], PARAMS))


def test_aborted_row_is_computed_on_for_the_equal_row_that_joined_it():
    subject: EngineCore = tiny_engine().core
    for name in ("first", "second"):
        subject.add(name, ScoringRequest(PROMPT, (5, 6, 7)))
    subject.abort({"first"})
    (output,) = steps_to_the_end(subject)
    assert output.request_id == "second"
    assert output.score is not None
    assert output.score == tiny_engine().loglikelihood([(PROMPT, (5, 6, 7))])[0]


def test_aborted_row_is_computed_no_longer_than_the_equal_rows_that_joined_it_want():
    subject: EngineCore = tiny_engine(enable_prefix_caching=True).core
    for name in ("first", "second"):
        subject.add(name, ScoringRequest(PROMPT, (5, 6, 7)))
    subject.abort({"first"})
    subject.abort({"second"})
    assert not subject.scheduler.has_work
    assert steps_to_the_end(subject) == []


def test_row_with_the_id_of_a_row_in_the_engine_is_refused():
    subject: EngineCore = tiny_engine().core
    subject.add("same", GenerationRequest(PROMPT, PARAMS, b""))
    with pytest.raises(ValueError, match="'same' again"):
        subject.add("same", GenerationRequest(PROMPT, PARAMS, b""))
    assert [output.request_id for output in steps_to_the_end(subject)] == ["same"]


def test_aborted_rows_that_cannot_run_are_not_answered():
    subject = tiny_engine(max_model_len=20).core
    subject.add("too long", GenerationRequest([Segment((5,) * 30, True)], PARAMS, b""))
    subject.abort({"too long"})
    assert not subject.has_work


def test_logits_of_a_prompt_that_cannot_run_is_its_error_and_the_engine_goes_on():
    subject = tiny_engine(max_model_len=20)
    good = [Segment((5, 6), True)]
    with pytest.raises(RowError, match="the prompt has 30 tokens"):
        subject.logits([good, [Segment((5,) * 30, True)]])
    torch.testing.assert_close(subject.logits([good])[0], oracle_logits(oracle_model(), good)[-1], atol=1e-4, rtol=0)


def test_logits_where_the_device_has_no_memory_for_a_step_are_those_of_smaller_steps(monkeypatch):
    prompts = shared_prompts()
    wanted = tiny_engine().logits(prompts)
    subject = tiny_engine()
    forward = TreeModel.forward

    def limited(self, blocks, run):
        if blocks.num_tokens > 70:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(self, blocks, run)

    monkeypatch.setattr(TreeModel, "forward", limited)
    torch.testing.assert_close(subject.logits(prompts), wanted, atol=1e-4, rtol=0)
    assert subject.stats.num_shrunk_steps > 0
