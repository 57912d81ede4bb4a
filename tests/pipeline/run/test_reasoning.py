"""A job that splits reasoning from its answers: the echo answers with the end of its prompt."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo_jobs import rows_of, write_job
from in_process import run_here

from segue.pipeline.problems import JobRefused

# The answer is what follows "|" in the prompt. The header opens the reasoning for prompts that say so.
SOURCE = "{% for m in messages %}{{ m.content }}{% endfor %}{# </think> #}"


def run_prompts(folder: Path, answers: list[str], **sections) -> list[dict]:
    (folder / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["." * 40 + answer for answer in answers]}), folder / "in" / "a.parquet")
    size = max(map(len, answers))
    path = write_job(
        folder,
        prompt={"chat_template": SOURCE},
        sampling_params={"max_tokens": size, **sections.pop("sampling_params", {})},
        **sections,
    )
    run_here(path)
    return [row for _, row in sorted(rows_of(folder / "out").items())]


def test_reasoning_is_a_column_beside_the_answer(tmp_path):
    answers = ["<think>fox?</think>dog", "<think>fox and so on.", "just an answer that is it"]
    size = max(map(len, answers))
    rows = run_prompts(
        tmp_path, [answer.rjust(size) for answer in answers], output={"path": "out", "split_reasoning": True}
    )
    assert [(row["reasoning_text"], row["generated_text"].strip()) for row in rows] == [
        ("fox?", "dog"),
        ("fox and so on.", ""),
        (None, "just an answer that is it"),
    ]


def test_samples_are_split_too(tmp_path):
    (row,) = run_prompts(
        tmp_path,
        ["<think>fox?</think>dog"],
        sampling_params={"n": 2},
        output={"path": "out", "split_reasoning": True},
    )
    assert [(each["reasoning_text"], each["generated_text"]) for each in row["samples"]] == [("fox?", "dog")] * 2


def test_column_is_there_only_when_asked_for(tmp_path):
    (row,) = run_prompts(tmp_path, ["<think>fox?</think>dog"])
    assert "reasoning_text" not in row
    assert row["generated_text"] == "<think>fox?</think>dog"


@pytest.mark.parametrize(
    "sections",
    [
        {"prompt": {"chat_template": "{{ messages[0].content }}"}},
        {"prompt": {"format": "text", "text": "{prompt}"}},
        {"task": "choose", "scoring": {"choices": ["a", "b"]}, "sampling_params": None},
    ],
    ids=["no markers", "no chat", "no answers"],
)
def test_job_without_reasoning_cannot_split_it(tmp_path, sections):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "in" / "a.parquet")
    job = json.loads(write_job(tmp_path, output={"path": "out", "split_reasoning": True}).read_text())
    path = tmp_path / "other.yaml"
    path.write_text(json.dumps({key: value for key, value in (job | sections).items() if value is not None}))
    with pytest.raises(JobRefused, match="split_reasoning"):
        run_here(path)
