"""`segue evaluate`: numbers of finished outputs, by hand and against scipy; two outputs compared."""

import math
from typing import Any

import pyarrow as pa
import pytest
from commands import last_line, segue
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from segue.jobs.analysis.evaluate import compare, evaluate
from segue.jobs.analysis.judge import Judging
from segue.jobs.analysis.statistics import mcnemar, wilson_interval
from segue.pipeline.ledger.columns import result_schema, result_table
from segue.pipeline.ledger.manifest import SUCCESS, ForeignOutput, Manifest
from segue.pipeline.ledger.shards import PROTOCOL, ShardFooter, commit_shard, serialize_shard
from segue.pipeline.ledger.units import UnitSpec
from segue.pipeline.problems import JobRefused
from segue.pipeline.storage.folder import LocalStore
from segue.workers.rows.params import SamplingParams

NOTHING = pa.schema([])
ERROR = {"code": "NULL_PROMPT", "message": "the prompt is null"}


def output(folder, task, shards: list[list[dict[str, Any]]], passed: pa.Schema = NOTHING, *, finished=True):
    """A folder as a run leaves it, with rows given by hand."""
    store = LocalStore(folder)
    units = tuple(UnitSpec(n, f"{n:016d}", len(rows), len(rows), 1) for n, rows in enumerate(shards))
    manifest = Manifest(PROTOCOL, "quiz", "2026-01-02", {"task": task}, {}, units, {})
    store.create("_job/manifest.json", manifest.to_bytes())
    schema = result_schema(passed, SamplingParams(), task)
    for unit, rows in zip(units, shards, strict=True):
        own = [{"src_path": "a", "src_row": 100 * unit.ordinal + n} | row for n, row in enumerate(rows)]
        through = pa.table(
            {field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in passed}
        )
        footer = ShardFooter(PROTOCOL, manifest.fingerprint, unit.unit_id, len(rows), {}, 0, 0, 0)
        commit_shard(store, unit, serialize_shard(result_table(schema, through, own), footer), manifest.fingerprint)
    if finished:
        store.create(SUCCESS, b"{}")
    return str(folder)


def chosen(correct: bool | None, correct_norm: bool | None = None, **columns: Any) -> dict[str, Any]:
    return {"correct": correct, "correct_norm": correct if correct_norm is None else correct_norm, **columns}


TASKS = pa.schema([pa.field("task", pa.string())])


def test_evaluate_choices_by_task(tmp_path):
    first = [chosen(True, task="a"), chosen(False, True, task="a"), chosen(True, task="b")]
    second = [chosen(None, task="b"), {"error": ERROR, "task": "b"}, chosen(False, task="b")]
    found, _ = evaluate(output(tmp_path / "out", "choose", [first, second], TASKS), Judging())
    a, b, both = found.groups
    assert (a.name, a.n, a.acc, a.acc_norm, a.errors, a.unlabelled) == ("a", 2, 0.5, 1.0, 0, 0)
    assert (b.name, b.n, b.acc, b.errors, b.unlabelled) == ("b", 2, 0.5, 1, 1)
    assert (both.name, both.n, both.acc, both.acc_norm) == ("all", 4, 0.5, 0.75)
    assert both.acc_interval == wilson_interval(2, 4)


def test_evaluate_groups_by_any_column_and_names_one_that_is_missing(tmp_path):
    rows = [chosen(True, level=1), chosen(False, level=2), chosen(False, level=None)]
    folder = output(tmp_path / "out", "choose", [rows], pa.schema([pa.field("level", pa.int8())]))
    assert [group.name for group in evaluate(folder, Judging(by="level"))[0].groups] == ["1", "2", "(none)", "all"]
    with pytest.raises(JobRefused, match=r"--by: got 'levle'.*did you mean 'level'"):
        evaluate(folder, Judging(by="levle"))


ANSWERS = pa.schema([pa.field("answer", pa.string())])


def generated(*pairs: tuple[str | None, str | None]) -> list[dict[str, Any]]:
    return [
        {"generated_text": text, "answer": answer, "error": None if text is not None else ERROR}
        for text, answer in pairs
    ]


def test_evaluate_generated_answers_by_regex_or_exactly(tmp_path):
    rows = generated(
        ("It is 12.", "12"), ("It is 13.", "12"), ("no idea", "12"), (" 12\n", "12"), (None, "1"), ("1", None)
    )
    folder = output(tmp_path / "out", "generate", [rows], ANSWERS)
    (by_regex,) = evaluate(folder, Judging(label="answer", regex=r"(\d+)\.?"))[0].groups
    assert (by_regex.acc, by_regex.n, by_regex.unparsed, by_regex.errors, by_regex.unlabelled) == (0.5, 4, 1, 1, 1)
    (exactly,) = evaluate(folder, Judging(label="answer"))[0].groups
    assert (exactly.acc, exactly.n) == (0.25, 4)


def test_evaluate_instruction_format_takes_the_first_answer_in_the_text(tmp_path):
    rows = generated(
        ("the correct answer is answer2", "answer2"),
        ("answer1 or answer2", "answer2"),
        ("the correct answer is true", "true"),
    )
    folder = output(tmp_path / "out", "generate", [rows], ANSWERS)
    code, out, _ = segue("evaluate", folder, "--preset", "commonsense")
    (group,) = last_line(out)["groups"]
    assert (code, group["acc"], group["n"]) == (0, pytest.approx(2 / 3), 3)
    assert "0.6667" in out.splitlines()[2]


def test_evaluate_texts_weighs_them_by_size(tmp_path):
    rows = [
        {"logprob": -10.0, "num_tokens": 4, "num_words": 2, "num_bytes": 10},
        {"logprob": -30.0, "num_tokens": 6, "num_words": 6, "num_bytes": 30},
        {"error": ERROR},
    ]
    (group,) = evaluate(output(tmp_path / "out", "perplexity", [rows]), Judging())[0].groups
    assert group.word_perplexity == pytest.approx(math.exp(40 / 8))
    assert group.byte_perplexity == pytest.approx(math.exp(1))
    assert group.bits_per_byte == pytest.approx(1 / math.log(2))
    assert group.token_perplexity == pytest.approx(math.exp(4))
    assert (group.n, group.errors) == (2, 1)


def test_evaluate_continuations_by_mean_and_by_greedy_match(tmp_path):
    rows = [
        {"logprob": -1.0, "is_greedy": True, "num_tokens": 1},
        {"logprob": -3.0, "is_greedy": False, "num_tokens": 2},
    ]
    (group,) = evaluate(output(tmp_path / "out", "loglikelihood", [rows]), Judging())[0].groups
    assert (group.mean_logprob, group.acc, group.n) == (-2.0, 0.5, 2)


def test_evaluate_of_what_is_not_complete_or_empty(tmp_path):
    with pytest.raises(ForeignOutput, match="is not complete"):
        evaluate(output(tmp_path / "half", "choose", [[chosen(True)]], finished=False), Judging())
    with pytest.raises(ForeignOutput, match="is not an output folder"):
        evaluate(str(tmp_path), Judging())
    (group,) = evaluate(output(tmp_path / "none", "choose", []), Judging())[0].groups
    assert (group.n, group.acc) == (0, None)


def test_evaluate_generated_answers_without_a_label_says_what_is_missing(tmp_path):
    folder = output(tmp_path / "out", "generate", [generated(("a", "a"))], ANSWERS)
    with pytest.raises(JobRefused, match="--label: got nothing"):
        evaluate(folder, Judging())
    with pytest.raises(JobRefused, match=r"--label: got 'anwser'.*did you mean 'answer'"):
        evaluate(folder, Judging(label="anwser"))
    with pytest.raises(JobRefused, match="--regex: got '\\('"):
        evaluate(folder, Judging(label="answer", regex="("))


def test_compare_pairs_rows_by_where_they_come_from(tmp_path):
    first = [chosen(True), chosen(True), chosen(True, False), chosen(False), chosen(None)]
    second = [chosen(True), chosen(False), chosen(False), chosen(False), chosen(True)]
    tables = [
        evaluate(output(tmp_path / name, "choose", [rows]), Judging())[1]
        for name, rows in (("a", first), ("b", second))
    ]
    right, normed = compare(*tables)
    assert (right.metric, right.n, right.both, right.only_first, right.only_second, right.neither) == (
        "correct",
        4,
        1,
        2,
        0,
        1,
    )
    assert right.p_value == pytest.approx(0.5)
    assert (normed.metric, normed.only_first) == ("correct_norm", 1)


def test_compare_of_outputs_without_a_row_in_common_is_refused(tmp_path):
    tables = [
        evaluate(output(tmp_path / name, "choose", [[chosen(label)]]), Judging())[1]
        for name, label in (("a", True), ("b", None))
    ]
    with pytest.raises(JobRefused, match="a row with a right or wrong answer that both outputs have"):
        compare(*tables)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_equals_scipys_exact_binomial_test(first, second):
    wanted = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(wanted, rel=1e-9)


def test_mcnemar_of_many_disagreements_is_close_to_the_exact_test():
    assert mcnemar(1050, 1150) == pytest.approx(binomtest(1050, 2200).pvalue, rel=0.02)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_equals_scipys(pair):
    successes, trials = pair
    wanted = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
