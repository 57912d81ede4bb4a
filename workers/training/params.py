"""The job's `lora:` and `training:` sections: what is trained of a model, how long, how fast, and when it is evaluated.

Data only: it is checked when the job is loaded, printed, and written beside the output. Names are those of PEFT and of
transformers' Trainer where they have one. Defaults are the MAS paper's (Katz et al., arXiv 2412.18487).
`workers/training/trainer.py` applies it.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _int_to_float(value: object) -> object:
    """In YAML an integer may stand for a float."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


_Names = Annotated[tuple[str, ...], BeforeValidator(_list_to_tuple), Field(min_length=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Number = Annotated[float, BeforeValidator(_int_to_float)]


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is not a finite number. The message names the step."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class LoraParams(_Section):
    """Low-rank adapters (Hu et al., arXiv 2106.09685)."""

    r: PositiveInt = 32  # rank
    alpha: Annotated[Number, Field(gt=0)] = 64.0  # what is learned counts alpha / r times
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.05  # of the adapter's input, in training
    # names of linear layers; PEFT's "all-linear" is all but the vocabulary's
    target_modules: Literal["all-linear"] | _Names = ("q_proj", "v_proj")


class TrainingParams(_Section):
    """One training."""

    WITHOUT_EFFECT: ClassVar[set[str]] = {
        "max_num_batched_tokens",
        "save_steps",
        "gradient_checkpointing",
    }  # on results

    num_epochs: PositiveInt = 3  # how often each example is seen
    max_steps: PositiveInt | None = None  # ends the training if the epochs have more
    batch_size: PositiveInt = 16  # examples whose gradients make one step
    max_num_batched_tokens: PositiveInt = 4096  # of one forward pass, padding included; the rest is accumulated
    learning_rate: Annotated[Number, Field(gt=0)] = 2e-4  # of AdamW, after the warm-up
    warmup_steps: Annotated[int, Field(ge=0)] = 100  # in which the learning rate rises from 0
    lr_scheduler: Literal["linear", "constant"] = "linear"  # after the warm-up, to 0 at the end
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0  # AdamW's
    max_grad_norm: Annotated[Number, Field(gt=0)] = 1.0  # larger gradients are scaled down to it
    eval_steps: PositiveInt = 100  # steps between looks at the held-out examples; there is one at the end, too
    save_steps: PositiveInt = 100  # steps between checkpoints
    early_stopping_patience: PositiveInt | None = None  # looks without a better loss after which training ends
    keep: Literal["best", "last"] = "best"  # by the held-out loss; without held-out examples it is the last
    gradient_checkpointing: bool = False  # recompute layers in the backward pass: less memory, a third more time

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """The learning rate of a step. Steps are numbered from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.lr_scheduler == "constant":
            return self.learning_rate
        return self.learning_rate * (num_steps - step) / max(1, num_steps - self.warmup_steps)
