"""The training loop: it learns, resumes as if nothing had happened, and says when it cannot go on."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model

from segue.attention.segments import Segment
from segue.workers.training.batches import PASS_TOKENS, TrainingExample, batch_of_step, forward_passes
from segue.workers.training.checkpoints import Checkpoints
from segue.workers.training.model import TrainingModel
from segue.workers.training.params import LoraParams, TrainingDiverged, TrainingParams
from segue.workers.training.ranks import Ranks
from segue.workers.training.trainer import EvaluationReport, StepReport, Trainer

# The answer begins with the prompt's first token: nothing but attention to it helps. Answers have 2 to 5 tokens.
EXAMPLES = [
    TrainingExample(
        (Segment((10 + i % 5, *range(30, 33 + i % 4)), True), Segment((4,), False)), (10 + i % 5, *[60] * (i % 4), 2)
    )
    for i in range(20)
]
HELD_OUT = EXAMPLES[:5]
# One of five first tokens, how often it is followed by the same one, then the end.
LOSS_OF_GUESSING = (math.log(5) + math.log(4)) / 3.5
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def params(**changes):
    defaults = {
        "num_epochs": 2,
        "batch_size": 4,
        "max_num_batched_tokens": 64,
        "learning_rate": 2e-2,
        "warmup_steps": 2,
        "eval_steps": 3,
        "save_steps": 4,
    }
    return TrainingParams(**defaults | changes)


def trainer(held_out=HELD_OUT, ranks=None, dropout=0.1, **changes):
    lora = LoraParams(r=8, alpha=16, dropout=dropout, target_modules=MODULES)
    model = TrainingModel(tiny_model("llama"), lora, seed=1)
    return Trainer(model, EXAMPLES, held_out, params(**changes), seed=3, ranks=ranks)


def run(subject, folder, stop_after=None):
    """What was reported."""
    events = []

    def should_stop():
        return stop_after is not None and subject.progress.step >= stop_after

    checkpoints = Checkpoints(folder)
    subject.resume(checkpoints)
    subject.run(checkpoints, events.append, should_stop)
    return events


def curve(events):
    """Everything but the times."""
    found = [dataclasses.asdict(event) for event in events]
    return [{k: v for k, v in event.items() if k not in ("tokens_per_second", "seconds_left")} for event in found]


def weights(subject):
    return {name: parameter.detach().clone() for name, parameter in subject._model.trainable.items()}


def test_training_learns_what_only_the_prompt_tells(tmp_path):
    events = run(trainer(num_epochs=12, dropout=0.0, eval_steps=20), tmp_path)
    looks = [event for event in events if isinstance(event, EvaluationReport)]
    assert looks[-1].eval_loss < 0.85 * LOSS_OF_GUESSING < looks[0].eval_loss
    steps = [event for event in events if isinstance(event, StepReport)]
    assert [event.step for event in steps] == list(range(1, 61))
    assert [look.step for look in looks] == [20, 40, 60]


@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_training_that_was_stopped_goes_on_with_the_same_curve_and_weights(tmp_path, stop_after):
    whole = trainer()
    wanted = run(whole, tmp_path / "whole")
    before = run(trainer(), tmp_path / "killed", stop_after)
    resumed = trainer()
    after = run(resumed, tmp_path / "killed")
    assert curve(before) + curve(after) == curve(wanted)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_training_that_was_killed_between_checkpoints_goes_on_from_the_last(tmp_path):
    def die(event):
        if event.step == 6:
            raise KeyboardInterrupt

    killed = trainer()
    with pytest.raises(KeyboardInterrupt):
        killed.run(Checkpoints(tmp_path), die)
    resumed = trainer()
    assert resumed.resume(Checkpoints(tmp_path)) == 4
    events = []
    resumed.run(Checkpoints(tmp_path), events.append)
    assert curve(events) == curve(run(trainer(), tmp_path / "whole"))[-len(events) :]


def test_finished_training_does_nothing_more_and_keeps_its_weights(tmp_path):
    first = trainer()
    run(first, tmp_path)
    second = trainer()
    assert run(second, tmp_path) == []
    for name, weight in weights(first).items():
        assert torch.equal(weight, weights(second)[name]), name


def test_gradients_do_not_depend_on_how_a_step_is_cut_into_passes(tmp_path):
    seen = []
    for budget in (1, 64, 4096):
        events = run(trainer(max_num_batched_tokens=budget, dropout=0.0), tmp_path / str(budget))
        steps = [event for event in events if isinstance(event, StepReport)]
        seen.append([number for step in steps for number in (step.loss, step.grad_norm)])
    assert seen[0] == pytest.approx(seen[1], abs=1e-4, rel=1e-3)
    assert seen[0] == pytest.approx(seen[2], abs=1e-4, rel=1e-3)


def test_loss_of_a_step_is_the_mean_over_its_answer_tokens(tmp_path):
    subject = trainer(dropout=0.0)
    examples = [EXAMPLES[index] for index in batch_of_step(0, len(EXAMPLES), 4, 3)]
    with torch.no_grad():
        wanted = -torch.cat([subject._model.logprobs([example]) for example in examples]).mean()
    first = run(subject, tmp_path)[0]
    assert first.loss == pytest.approx(float(wanted), abs=1e-5)
    assert first.num_answer_tokens == sum(len(example.answer) for example in examples)
    means = [float(subject_mean) for subject_mean in _means(trainer(dropout=0.0), examples)]
    assert abs(first.loss - sum(means) / len(means)) > 1e-3  # which a mean of means would be
    assert first.num_tokens == sum(example.num_fed_tokens for example in examples)


@torch.no_grad()
def _means(subject, examples):
    subject._model.train(False)
    return [-subject._model.logprobs([example]).mean() for example in examples]


def test_early_stopping_ends_the_training_and_the_best_adapter_is_kept(tmp_path):
    # Answers that contradict those learned: the better the training, the worse the look.
    contrary = [TrainingExample(example.segments, (50, 2)) for example in HELD_OUT]
    subject = trainer(contrary, num_epochs=20, early_stopping_patience=2, dropout=0.0, warmup_steps=0)
    events = run(subject, tmp_path)
    looks = [event for event in events if isinstance(event, EvaluationReport)]
    assert subject.progress.is_stopped
    assert subject.progress.step < subject.num_steps
    assert not any(look.is_best for look in looks[-2:])
    best = min(look.eval_loss for look in looks)
    assert subject.evaluate()[0] == pytest.approx(best, abs=1e-6)
    assert subject.kept_loss == best
    assert best < looks[-1].eval_loss
    assert run(trainer(contrary, num_epochs=20, early_stopping_patience=2, dropout=0.0), tmp_path) == []


def test_looks_are_without_dropout(tmp_path):
    losses = []
    for dropout in (0.0, 0.9):
        subject = trainer(dropout=dropout)
        with torch.no_grad():
            for name, parameter in subject._model.trainable.items():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
        losses += [subject.evaluate()[0], subject.evaluate()[0]]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-6)


def test_last_adapter_is_kept_if_asked_for(tmp_path):
    contrary = [TrainingExample(example.segments, (50, 2)) for example in HELD_OUT]
    subject = trainer(contrary, keep="last", num_epochs=4, dropout=0.0, warmup_steps=0)
    looks = [event for event in run(subject, tmp_path) if isinstance(event, EvaluationReport)]
    assert subject.evaluate()[0] == pytest.approx(looks[-1].eval_loss, abs=1e-6)
    assert subject.kept_loss == looks[-1].eval_loss


def test_loss_that_is_no_number_is_told_with_its_step(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"step \d+: loss (nan|inf)"):
        run(trainer(learning_rate=1e30, max_grad_norm=1e30, warmup_steps=0), tmp_path)


def test_checkpoint_of_other_adapters_is_refused(tmp_path):
    run(trainer(), tmp_path, stop_after=1)
    model = TrainingModel(tiny_model("llama"), LoraParams(target_modules=("k_proj",)), seed=1)
    other = Trainer(model, EXAMPLES, HELD_OUT, params(), seed=3)
    with pytest.raises(ValueError, match="other adapters"):
        other.resume(Checkpoints(tmp_path))


def test_half_written_checkpoint_is_never_gone_on_from(tmp_path):
    run(trainer(), tmp_path, stop_after=4)
    (tmp_path / ".tmp-step-00000009").mkdir()
    assert trainer().resume(Checkpoints(tmp_path)) == 4


def test_old_checkpoints_are_removed(tmp_path):
    run(trainer(num_epochs=4, save_steps=2), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000018", "step-00000020"]


def test_learning_rate_rises_and_falls():
    subject = TrainingParams(learning_rate=1.0, warmup_steps=4)
    rates = [subject.learning_rate_at(step, 10) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    constant = TrainingParams(learning_rate=1.0, warmup_steps=0, lr_scheduler="constant")
    assert {constant.learning_rate_at(step, 10) for step in range(10)} == {1.0}


@given(count=st.integers(1, 40), size=st.integers(1, 9), seed=st.integers(0, 5))
def test_every_epoch_has_each_example_once(count, size, seed):
    steps = math.ceil(count / size)
    epochs = [[batch_of_step(epoch * steps + step, count, size, seed) for step in range(steps)] for epoch in range(2)]
    for batches in epochs:
        assert sorted(index for batch in batches for index in batch) == list(range(count))
        assert all(len(batch) == size for batch in batches[:-1])
    if count > 20:
        assert epochs[0] != epochs[1]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), budget=st.integers(1, 60))
def test_passes_have_every_example_and_keep_the_budget(lengths, budget):
    examples = [
        TrainingExample((Segment(tuple(range(length)), False),), (number,)) for number, length in enumerate(lengths)
    ]
    passes = forward_passes(examples, budget)
    assert sorted(example.answer for batch in passes for example in batch) == [(n,) for n in range(len(lengths))]
    for batch in passes:
        padded = len(batch) * max(example.num_fed_tokens for example in batch)
        assert padded <= budget or len(batch) == 1


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=7), budget=st.integers(1, 300))
def test_no_other_cut_into_passes_computes_less(lengths, budget):
    def computed(passes):
        return sum(len(each) * max(each) + PASS_TOKENS for each in passes)

    ordered = sorted(lengths, reverse=True)
    cuts = itertools.product((False, True), repeat=len(ordered) - 1)
    ways = [[list(run) for run in _runs(ordered, cut)] for cut in cuts]
    allowed = [way for way in ways if all(len(each) == 1 or len(each) * each[0] <= budget for each in way)]
    examples = [TrainingExample((Segment(tuple(range(length)), False),), (0,)) for length in lengths]
    found = [[example.num_fed_tokens for example in batch] for batch in forward_passes(examples, budget)]
    assert computed(found) == min(map(computed, allowed))


def _runs(values, cut_after):
    start = 0
    for stop, is_cut in enumerate([*cut_after, True], start=1):
        if is_cut:
            yield values[start:stop]
            start = stop


def test_ranks_of_a_lone_process_leave_sums_as_they_are():
    tensor = torch.tensor([1.0, 2.0])
    Ranks().sum_([tensor])
    assert tensor.tolist() == [1.0, 2.0]
    assert Ranks().sum(3.0, 4.0) == [3.0, 4.0]
