"""A row's results from the scores of its requests, computed by hand."""

import math

import pytest

from segue.attention.segments import Segment
from segue.pipeline.ledger.columns import RESULT_COLUMNS, score_values
from segue.workers.errors import RowError, RowErrorCode
from segue.workers.rows.request import RequestOutput, Score
from segue.workers.scoring.rows import ScoreRow


def outputs(*logprobs, num_tokens=2):
    return [
        RequestOutput(n, [], 1, score=Score(logprob, num_tokens, logprob > -1), num_scored_prompt_tokens=5)
        for n, logprob in enumerate(logprobs)
    ]


def row(sizes, label=None):
    return ScoreRow((Segment((1,), False),), tuple((2, 3) for _ in sizes), tuple(sizes), label)


def test_choice_is_the_likeliest_and_choice_norm_the_likeliest_for_each_character():
    values = score_values(row([2, 10], label=1), "choose", outputs(-3.0, -5.0))
    assert (values["choice"], values["choice_norm"]) == (0, 1)  # -1.5 and -0.5 a character
    assert (values["correct"], values["correct_norm"]) == (False, True)
    assert (values["choice_logprobs"], values["choice_is_greedy"]) == ([-3.0, -5.0], [False, False])
    assert (values["num_input_tokens"], values["num_cached_tokens"], values["error"]) == (10, 2, None)


def test_first_of_equal_choices_wins():
    values = score_values(row([4, 4, 4]), "choose", outputs(-3.0, -2.0, -2.0))
    assert (values["choice"], values["choice_norm"]) == (1, 1)


def test_row_without_label_is_neither_right_nor_wrong():
    values = score_values(row([4, 4]), "choose", outputs(-3.0, -2.0))
    assert (values["correct"], values["correct_norm"]) == (None, None)


def test_choice_without_characters_never_wins_for_its_characters():
    values = score_values(row([0, 4]), "choose", outputs(-0.1, -20.0))
    assert (values["choice"], values["choice_norm"]) == (0, 1)


def test_perplexity_is_that_of_a_token_over_all_windows():
    text = ScoreRow((Segment((1,), False),), ((2, 3, 4),), (2, 9))
    values = score_values(text, "perplexity", outputs(-3.0, -1.0, num_tokens=4))
    assert values["perplexity"] == pytest.approx(math.exp(4 / 8))
    assert (values["logprob"], values["num_tokens"], values["num_words"], values["num_bytes"]) == (-4.0, 8, 2, 9)


@pytest.mark.parametrize("task", ["choose", "loglikelihood", "perplexity"])
def test_what_fails_one_request_fails_its_row_and_every_column_is_known(task):
    good = outputs(-1.0, -2.0)
    failed = RequestOutput(1, [], 0, error=RowError(RowErrorCode.ROW_OOM, "too much"), num_scored_prompt_tokens=5)
    values = score_values(row([1, 1]), task, [good[0], failed])
    assert values["error"] == {"code": "ROW_OOM", "message": "too much"}
    assert set(values) == {"error", "num_input_tokens"}
    assert set(score_values(row([1, 1]), task, good)) <= set(RESULT_COLUMNS[task])
