"""Forms that are refused before any row is drawn: those that cannot be enforced, and those that make no sense."""

import re

import pytest
from pydantic import ValidationError

from segue.workers.rows.forms import StructuredOutputs, problem_of
from segue.workers.rows.params import SamplingParams


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"not": {"type": "string"}}}, "not"),
        ({"json": {"if": {"type": "string"}, "then": {"minLength": 2}}}, "if, then"),
        ({"json": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, "oneOf"),
        ({"json": '{"const": NaN}'}, "this JSON schema"),
        ({"json": '{"minimum": ' + "9" * 400 + "}"}, "this JSON schema"),
        ({"json": '{"const": "\\ud800secret"}'}, "this JSON schema"),
        ({"json": {"const": "\ud800secret"}}, "this JSON schema"),
        ({"json": '{"items": ' * 200 + "{}" + "}" * 200}, "this JSON schema"),
        ({"json": {"type": "secret"}}, "type"),
        ({"json": {"$ref": "http://secret/x"}}, "this JSON schema"),
        ({"regex": "(?=secret)b"}, "this regular expression"),
        ({"regex": "(secret"}, "this regular expression"),
        ({"regex": r"[A-\d]secret"}, "this regular expression"),
    ],
)
def test_form_that_cannot_be_enforced_is_refused_in_words_that_do_not_quote_it(form, said):
    problem = problem_of(StructuredOutputs(**form))
    assert problem is not None
    assert said in problem
    assert "secret" not in problem


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({}, "exactly one of json, regex and choice, got 0"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of json, regex and choice, got 2"),
        ({"json": "[1"}, "a JSON schema"),
        ({"json": "true"}, "a JSON schema"),
        ({"json": {"type": "object", "x-guidance": {"whitespace_pattern": "abc"}}}, "must not have x-guidance"),
        ({"json": {"maximum": float("nan")}}, "JSON's values only"),
        ({"choice": []}, "at least 1"),
        ({"choice": [""]}, "at least 1"),
        ({"grammar": "x"}, "Extra inputs"),
    ],
)
def test_form_that_says_nothing_is_refused(form, said):
    with pytest.raises(ValidationError, match=re.escape(said)):
        SamplingParams.model_validate({"structured_outputs": form})


@pytest.mark.parametrize(
    "other",
    [
        {"stop": "x"},
        {"stop_token_ids": [3]},
        {"min_tokens": 2},
        {"ignore_eos": True},
        {"skip_special_tokens": False},
        {"include_stop_str_in_output": True},
    ],
)
def test_what_would_break_the_form_is_refused_beside_it(other):
    with pytest.raises(ValidationError, match=f"leave out {next(iter(other))}"):
        SamplingParams.model_validate({"structured_outputs": {"regex": "a+"}, **other})
