"""The training loop: adapters learn to give the tokens of answers, and are evaluated, saved and resumed on the way.

The loss is that of answers only: under the segment mask a prompt's token sees its successor, so a loss on prompts would
reward copying. It is averaged over the answer tokens of a step, whichever processes compute them. Batches and dropout
follow from the seed and the step's number alone, so a training that was killed and resumed ends with the same weights.
Knows models and examples; no Ray, no dataset.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torch.optim import AdamW

from segue.workers.training.batches import TrainingExample, batch_of_step, forward_passes, num_steps, steps_per_epoch
from segue.workers.training.checkpoints import Checkpoints, Progress, TrainingState
from segue.workers.training.model import TrainingModel
from segue.workers.training.params import TrainingDiverged, TrainingParams
from segue.workers.training.ranks import Ranks

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class StepReport:
    """The numbers of one step."""

    step: int  # counted from 1
    num_steps: int
    epoch: float
    loss: float  # nats an answer token
    learning_rate: float
    grad_norm: float  # before clipping
    num_tokens: int  # fed in this step
    num_answer_tokens: int
    tokens_per_second: float  # of this step
    seconds_left: float


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The loss on the held-out examples after a step."""

    step: int
    eval_loss: float  # nats an answer token
    num_answer_tokens: int
    is_best: bool


Report = Callable[[StepReport | EvaluationReport], None]


class Trainer:
    """Trains one model on some examples. All processes of `ranks` get the same examples."""

    def __init__(
        self,
        model: TrainingModel,
        examples: Sequence[TrainingExample],
        held_out: Sequence[TrainingExample],
        params: TrainingParams,
        *,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        if not examples:
            raise ValueError("training needs at least one example, got none")
        self._model = model
        self._examples = examples
        self._held_out = held_out
        self._params = params
        self._seed = seed
        self._ranks = ranks or Ranks()
        self._parameters = model.trainable
        self._optimizer = AdamW(self._parameters.values(), lr=0.0, weight_decay=params.weight_decay)
        self._progress = Progress()
        if params.gradient_checkpointing:
            model.use_gradient_checkpointing()

    @property
    def num_steps(self) -> int:
        """The number of steps, unless the training stops early."""
        return num_steps(len(self._examples), self._params)

    @property
    def progress(self) -> Progress:
        return self._progress

    @property
    def kept_loss(self) -> float | None:
        """The held-out loss of the adapter that a finished training keeps; None without held-out examples."""
        return self._progress.best_loss if self._params.keep == "best" else self._progress.last_loss

    def run(self, checkpoints: Checkpoints, report: Report, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end, from the beginning or from the checkpoint that `resume` found.

        Returns False if `should_stop` ended it earlier; then a checkpoint has been saved. Raises TrainingDiverged.
        `report` is called in the first process only.
        """
        started = time.monotonic() - self._progress.seconds
        while self._progress.step < self.num_steps and not self._progress.is_stopped:
            if self._any(should_stop()):
                self._save(checkpoints)
                return False
            self._tell(report, self._step())
            self._progress.seconds = time.monotonic() - started
            is_last = self._progress.step == self.num_steps
            if self._held_out and (is_last or self._progress.step % self._params.eval_steps == 0):
                self._tell(report, self._look(checkpoints))
            self._progress.seconds = time.monotonic() - started
            if is_last or self._progress.is_stopped or self._progress.step % self._params.save_steps == 0:
                self._save(checkpoints)
        self._keep_wanted(checkpoints)
        return True

    def resume(self, checkpoints: Checkpoints) -> int:
        """Go on from the latest checkpoint, if there is one. Returns the number of steps that are done.

        Raises ValueError if the checkpoint is of other adapters.
        """
        found = checkpoints.latest()
        if found is not None:
            self._load(found.adapter)
            self._progress = found.progress
            self._load_moments(found)
        return self._progress.step

    @torch.no_grad()
    def evaluate(self) -> tuple[float, int]:
        """(loss in nats an answer token, number of answer tokens) of the held-out examples."""
        self._model.train(False)
        total = count = 0.0
        for batch in self._own_passes(self._held_out):
            logprobs = self._model.logprobs(batch)
            total -= float(logprobs.double().sum())
            count += len(logprobs)
        total, count = self._ranks.sum(total, count)
        return total / count, int(count)

    def _step(self) -> StepReport:
        started, step = time.monotonic(), self._progress.step
        chosen = batch_of_step(step, len(self._examples), self._params.batch_size, self._seed)
        examples = [self._examples[index] for index in chosen]
        num_tokens = sum(example.num_fed_tokens for example in examples)
        num_answer_tokens = sum(len(example.answer) for example in examples)
        loss, grad_norm = self._gradients(examples, num_answer_tokens, step)
        learning_rate = self._params.learning_rate_at(step, self.num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._progress.step += 1
        self._progress.num_tokens += num_tokens
        seconds = time.monotonic() - started
        mean = (self._progress.seconds + seconds) / self._progress.step
        return StepReport(
            step=step + 1,
            num_steps=self.num_steps,
            epoch=round((step + 1) / steps_per_epoch(len(self._examples), self._params.batch_size), 4),
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            num_tokens=num_tokens,
            num_answer_tokens=num_answer_tokens,
            tokens_per_second=num_tokens / seconds,
            seconds_left=mean * (self.num_steps - step - 1),
        )

    def _gradients(self, examples: Sequence[TrainingExample], num_answer_tokens: int, step: int) -> tuple[float, float]:
        """Computes the gradients of a step, summed over all processes and clipped.

        Returns (loss, norm of the gradients before clipping). Raises TrainingDiverged.
        """
        loss = self._backward(examples, num_answer_tokens, step)
        self._ranks.sum_([parameter.grad for parameter in self._parameters.values() if parameter.grad is not None])
        (loss,) = self._ranks.sum(loss)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._params.max_grad_norm))
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise TrainingDiverged(
                f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; wanted finite numbers. "
                "Try a lower training.learning_rate, in another output.path"
            )
        return loss, grad_norm

    def _backward(self, examples: Sequence[TrainingExample], num_answer_tokens: int, step: int) -> float:
        """Computes the gradients of this process's share of the step. Returns its share of the loss."""
        self._model.train(True)
        self._optimizer.zero_grad(set_to_none=False)
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # a process without examples adds zeros to the sum
        torch.manual_seed(Random(f"segue:{self._seed}:{step}:{self._ranks.rank}").getrandbits(63))  # for dropout
        loss = 0.0
        for batch in self._own_passes(examples):
            part = -self._model.logprobs(batch).sum() / num_answer_tokens
            part.backward()
            loss += float(part.detach())
        return loss

    def _own_passes(self, examples: Sequence[TrainingExample]) -> list[list[TrainingExample]]:
        """This process's share. Examples are dealt out longest first, so that shares are about equal."""
        by_length = sorted(examples, key=lambda example: -example.num_fed_tokens)
        return forward_passes(by_length[self._ranks.rank :: self._ranks.size], self._params.max_num_batched_tokens)

    def _look(self, checkpoints: Checkpoints) -> EvaluationReport:
        loss, count = self.evaluate()
        progress = self._progress
        progress.last_loss = loss
        is_best = progress.best_loss is None or loss < progress.best_loss
        progress.looks_since_best = 0 if is_best else progress.looks_since_best + 1
        if is_best:
            progress.best_loss, progress.best_step = loss, progress.step
            if self._ranks.is_first:
                checkpoints.save_best(progress, self._weights())
        patience = self._params.early_stopping_patience
        progress.is_stopped = patience is not None and progress.looks_since_best >= patience
        return EvaluationReport(progress.step, loss, count, is_best)

    def _tell(self, report: Report, event: StepReport | EvaluationReport) -> None:
        if self._ranks.is_first:
            report(event)

    def _any(self, flag: bool) -> bool:
        return self._ranks.sum(float(flag))[0] > 0

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def _save(self, checkpoints: Checkpoints) -> None:
        if self._ranks.is_first:
            checkpoints.save(TrainingState(self._progress, self._weights(), self._moments()))

    def _moments(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            state = self._optimizer.state[parameter]
            found |= {f"{name}:{moment}": state[moment] for moment in _MOMENTS if moment in state}
        return found

    def _load_moments(self, found: TrainingState) -> None:
        if found.progress.step == 0:
            return
        for name, parameter in self._parameters.items():
            state = {moment: found.optimizer[f"{name}:{moment}"].to(parameter.device) for moment in _MOMENTS}
            self._optimizer.state[parameter] = {"step": torch.tensor(float(found.progress.step)), **state}

    def _load(self, adapter: dict[str, Tensor]) -> None:
        if adapter.keys() != self._parameters.keys():
            raise ValueError("the checkpoint is of other adapters than this training's")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(adapter[name])

    def _keep_wanted(self, checkpoints: Checkpoints) -> None:
        """Load the adapter that the training ends with."""
        self._ranks.sum(0.0)  # wait until the first process has written it
        if self._progress.best_step is not None and self._params.keep == "best":
            self._load(checkpoints.best(self._progress.best_step))
