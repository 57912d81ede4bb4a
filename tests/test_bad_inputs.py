"""The matrix of bad inputs: what must be refused before work is, by name."""

import pytest
from bad_jobs import CASES, Case, is_expected, outcome_of


@pytest.fixture(autouse=True)
def _tiny_model(model_directory, monkeypatch):
    monkeypatch.setenv("SEGUE_TINY_MODEL", model_directory)


@pytest.mark.parametrize("each", CASES, ids=lambda each: f"{each.number} {each.what}")
def test_bad_job_is_refused_by_name(each: Case, tmp_path):
    got = outcome_of(each, tmp_path)
    assert is_expected(each, got), got
