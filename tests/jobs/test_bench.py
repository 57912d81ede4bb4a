"""The scoring benchmark's workload: read from LLM-Adapters' format, the same prompts in process as in its job file."""

import json

import pytest
from ready_jobs import ready_job

from segue.jobs.bench.arc import NUM_SHOTS, context_of, load, pairs_of, write_job
from segue.pipeline.prompts.render import encoder_of
from segue.workers.models.echo import echo_tokenizer


def line(number: int, question: str = "Why {braces}?", answer: str = "answer2") -> str:
    choices = " ".join(f"Answer{n}: choice {n} of {number}." for n in (1, 2, 3))
    instruction = (
        f"Please choose the correct answer to the question: {question} {number}\n\n{choices}\n\n"
        "Answer format: answer1/answer2/answer3"
    )
    return json.dumps({"id": f"q-{number}", "instruction": instruction, "answer": answer})


@pytest.fixture
def data(tmp_path):
    for name in ("test", "train"):
        (tmp_path / f"arc_easy-{name}.jsonl").write_text("\n".join(line(n) for n in range(NUM_SHOTS + 2)))
    return tmp_path


def test_arc_questions_are_read_with_choices_and_label(data):
    first = load(data / "arc_easy-test.jsonl")[0]
    assert (first.question, first.label) == ("Why {braces}? 0", 1)
    assert first.choices == ("choice 1 of 0.", "choice 2 of 0.", "choice 3 of 0.")


def test_arc_line_in_another_format_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text(line(3, answer="true"))
    with pytest.raises(ValueError, match="q-3: not a question"):
        load(tmp_path / "x.jsonl")


def test_arc_job_has_the_benchmarks_prompts(here, data, tmp_path):
    write_job(data, tmp_path / "job")
    job = ready_job(tmp_path / "job" / "job.yaml", "model.source=echo")
    questions, shots = load(data / "arc_easy-test.jsonl"), load(data / "arc_easy-train.jsonl")[:NUM_SHOTS]
    (segment,) = encoder_of(job.render_spec("2026-01-02")).encode({"question": questions[0].question})
    assert echo_tokenizer().decode(list(segment.token_ids)) == context_of(questions[0].question, shots)
    assert pairs_of(questions[:1], shots)[1] == (context_of(questions[0].question, shots), " choice 2 of 0.")
