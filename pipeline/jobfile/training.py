"""What a fine-tuning job file may say: a job that scores answers, and what is learned from them.

Rows are read, rendered and segmented by the code of scoring jobs: the prompt is the context, the answer what
`scoring.continuation` says. Knows nothing of YAML, models or Ray.
"""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from segue.pipeline.jobfile.schema import DataLocations, JobConfig, Section
from segue.workers.training.params import LoraParams, TrainingParams


class EvaluationConfig(Section):
    """Which rows are held out: never trained on, looked at during the training."""

    path: DataLocations | None = None  # files of their own; else a part of the input
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05  # of the input's rows; 0 holds none out
    max_examples: Annotated[int, Field(ge=1)] = 512  # as many of them are looked at


class FinetuneConfig(JobConfig):
    """A whole job file of `segue finetune`. `output.path` gets the adapter, checkpoints and metrics."""

    # there is no other in such a file
    task: Literal["finetune"] = "finetune"  # pyright: ignore[reportIncompatibleVariableOverride]
    mask: Literal["segment", "causal"] = "segment"  # under which the model learns; its runs then have it, too
    lora: LoraParams = LoraParams()  # what is trained
    training: TrainingParams = TrainingParams()  # how long and how fast
    evaluation: EvaluationConfig = EvaluationConfig()  # which rows are held out

    def other_paths(self, resolve: Callable[[str], str]) -> dict[str, Section]:
        paths = self.evaluation.path
        if paths is None:
            return {}
        return {"evaluation": self.evaluation.model_copy(update={"path": tuple(map(resolve, paths))})}
