"""The study of the segment mask: its items are what they say, and its report reads them right."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from example_modules import EXAMPLES, load_generator

from segue.jobs.analysis.statistics import mcnemar

STUDY = EXAMPLES / "mas-study"


def make_tasks() -> ModuleType:
    return load_generator(STUDY, "make_tasks")


@pytest.mark.parametrize("part", ["train", "test"])
def test_look_ups_have_one_answer_in_either_order(part: str) -> None:
    items = list(make_tasks().lookup_items(part, 200))
    for item in items:
        assert sorted(item.parts) == sorted(item.swapped)
        assert item.parts != item.swapped
        numbers, names, question = item.parts
        number_of = dict(pair.split() for pair in numbers.removeprefix("Numbers: ").rstrip(".").split(", "))
        colour_of = dict(pair.split() for pair in names.removeprefix("Names: ").rstrip(".").split(", "))
        asked = question.removeprefix("Which number has ").rstrip("?")
        assert number_of[colour_of[asked]] == item.choices[item.label]
        assert len({*item.choices}) == 6
    assert len({item.label for item in items}) == 6


def test_words_occur_in_their_sentence_and_no_other_option_does() -> None:
    tasks = make_tasks()
    sentences = [f"Which {word} grows near the river bank in summer?" for word in ("plant", "flower", "grass")]
    vocabulary = ["mountain", "river", "magnet", "planet", "summer", "engine"]
    for item in tasks.word_items("train", 3, sentences, vocabulary):
        options = item.parts[0].removeprefix("Which word is in the sentence? ").split()[1::2]
        found = [option in tasks.words_of(item.parts[1].removeprefix("Sentence: ")) for option in options]
        assert found == [n == item.label for n in range(4)]


def test_reads_the_questions_alone(tmp_path: Path) -> None:
    text = "Please choose the correct answer to the question: Why: does the old magnet attract iron nails so strongly?"
    line = {"instruction": f"{text}\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    found = make_tasks().sentences_in([tmp_path / "a.jsonl"])
    assert found == ["Why: does the old magnet attract iron nails so strongly?"]


def test_the_papers_tasks_offer_what_the_text_offers() -> None:
    asked = (
        "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: true/false"
    )
    line = {"id": "1", "instruction": asked, "answer": "false", "output": "the correct answer is false"}
    (row,) = make_tasks().paper_rows([json.dumps(line)], 1, "boolq")
    assert (row["kind"], row["instruction"], row["answer"]) == ("boolq", asked, "false")
    assert row["choices"] == ["the correct answer is true", "the correct answer is false"]
    assert row["choices"][row["label"]] == row["output"]


def result(arm: str, seed: int, right: str) -> dict[str, Any]:
    named = {"task": "lookup", "order": "question_first", "arm": arm, "seed": seed}
    return named | {"tokens": 1000, "right": {"choices": {"all": right}}}


def test_the_report_pairs_items_seed_by_seed() -> None:
    report = load_generator(STUDY, "report")
    results = [
        result("causal", 0, "1100000000"),
        result("causal", 1, "1000000000"),
        result("segment", 1, "1011111110"),
        result("segment", 0, "1011111111"),
        result("causal", 2, "1111111111"),  # no segment run of this seed yet
    ]
    _, _, causal, segment = (line.strip("| ").split(" | ") for line in report.table(results))
    assert causal[:6] == ["lookup", "question_first", "choices", "10", "causal", "3"]
    assert causal[7] == "0.200, 0.100, 1.000"
    assert segment[7] == "0.900, 0.800"
    assert segment[8].startswith("+0.700 ± ")
    assert segment[9] == f"{mcnemar(1, 8):.2g}, {mcnemar(0, 7):.2g}"


def test_a_paired_difference_is_over_items() -> None:
    report = load_generator(STUDY, "report")
    same = [[1, 0, 1, 0]] * 3
    assert report.paired_difference(same, same) == (0, 0)
    difference, half = report.paired_difference([[0, 0, 0, 0]], [[1, 0, 1, 0]])
    assert difference == 0.5
    assert half == pytest.approx(1.96 * (1 / 3) ** 0.5 / 2, abs=1e-3)
