"""Writes the quiz example: multiple-choice questions of four tasks, each with solved ones before it.

Knows `facts.yaml` and a seed; nothing of models, prompts or the pipeline.
Run it as `python jobs/examples/quiz/make_data.py`; the same seed always gives the same rows.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

HERE = Path(__file__).parent
SEED = 20261124
NUM_SHOTS = 4  # solved questions of a task; they are not asked
NUM_CHOICES = 4

SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),  # what `segue evaluate` groups by
        pa.field("shots", pa.string(), nullable=False),  # solved questions of the task: the same for all of its rows
        pa.field("question", pa.string(), nullable=False),
        pa.field("choices", pa.list_(pa.string()), nullable=False),
        pa.field("label", pa.int32(), nullable=False),  # the right choice's position, from 0
    ]
)

Row = dict[str, Any]


def make_rows(seed: int = SEED) -> list[Row]:
    """All rows, shuffled, so that those of a task are not neighbours in the file."""
    facts = YAML(typ="safe", pure=True).load((HERE / "facts.yaml").read_text(encoding="utf-8"))
    random = Random(seed)
    rows = [row for task in facts["tasks"] for row in _task_rows(task, random)]
    random.shuffle(rows)
    return rows


def make_table(seed: int = SEED) -> pa.Table:
    return pa.Table.from_pylist(make_rows(seed), SCHEMA)


def _task_rows(task: dict[str, Any], random: Random) -> Iterator[Row]:
    """Wrong choices are answers to other questions of the same task."""
    pairs = [(str(subject), str(answer)) for subject, answer in task["pairs"]]
    random.shuffle(pairs)
    answers = [answer for _, answer in pairs]
    question: str = task["question"]
    solved = [f"Question: {question.format(subject=s)}\nAnswer: {answer}\n\n" for s, answer in pairs[:NUM_SHOTS]]
    for subject, answer in pairs[NUM_SHOTS:]:
        choices = random.sample([other for other in answers if other != answer], NUM_CHOICES - 1)
        label = random.randrange(NUM_CHOICES)
        choices.insert(label, answer)
        yield {
            "task": task["name"],
            "shots": "".join(solved),
            "question": question.format(subject=subject),
            "choices": choices,
            "label": label,
        }


if __name__ == "__main__":
    pq.write_table(make_table(), HERE / "data" / "questions.parquet", row_group_size=50)
