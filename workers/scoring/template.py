"""The job's `scoring:` section: what is scored after a row's prompt, and what a row's label means.

Data only: it is checked when the job is loaded, printed, and part of the fingerprint. `workers/scoring/rows.py` applies
it to rows. Does not know tokenizers or models.
"""

from collections.abc import Collection, Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from segue.workers.prompts.placeholders import columns_in

RunTask = Literal["generate", "choose", "loglikelihood", "perplexity"]
Task = Literal[RunTask, "finetune"]
_TASKS_OF = {
    "choices": ("choose",),
    "choices_column": ("choose",),
    "label_column": ("choose",),
    "target_delimiter": ("choose",),
    "continuation": ("loglikelihood", "finetune"),
    "continuation_column": ("loglikelihood", "finetune"),
}


class ScoringTemplate(BaseModel):
    """What is scored. Names are lm-evaluation-harness' where it has one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    choices: tuple[str, ...] | None = Field(default=None, min_length=1)  # the same for all rows; may have {column}s
    choices_column: str = "choices"  # else each row's own list of texts
    label_column: str = "label"  # the right choice: its text or its position from 0; read if the dataset has it
    target_delimiter: str | None = None  # before each choice; by default " " after format text, else ""
    continuation: str | None = None  # with {column} placeholders, scored as it is
    continuation_column: str = "continuation"  # else this column, as it is

    @model_validator(mode="after")
    def _check_placeholders(self) -> "ScoringTemplate":
        for text in (*(self.choices or ()), self.continuation or ""):
            columns_in(text)
        return self

    def foreign_keys(self, task: str) -> list[str]:
        """The keys that were given but have no meaning for `task`."""
        return sorted(name for name in self.model_fields_set if task not in _TASKS_OF[name])

    def text_columns(self, task: str) -> frozenset[str]:
        """The columns whose text is scored."""
        return frozenset(self._text_columns(task))

    def label_of(self, task: str, available: Collection[str]) -> str | None:
        """The column of labels, if there is one. The caller checks that a column which the job names is there."""
        has_label = "label_column" in self.model_fields_set or self.label_column in available
        return self.label_column if task == "choose" and has_label else None

    def list_column(self, task: str) -> str | None:
        """The column of choices, if each row has its own."""
        return self.choices_column if task == "choose" and self.choices is None else None

    def delimiter(self, prompt_format: str) -> str:
        """The text between a prompt of this format and a choice."""
        if self.target_delimiter is not None:
            return self.target_delimiter
        return " " if prompt_format == "text" else ""

    def _text_columns(self, task: str) -> Iterator[str]:
        if task == "choose":
            for choice in self.choices or ():
                yield from columns_in(choice)
        elif task in _TASKS_OF["continuation"] and self.continuation is not None:
            yield from columns_in(self.continuation)
        elif task in _TASKS_OF["continuation"]:
            yield self.continuation_column
