"""Where answers end: stop strings beside min_tokens, and texts that would end inside a character."""

from typing import Any

import pytest
from tiny_engines import tiny_engine
from tiny_models import tiny_tokenizer

from segue.attention.segments import Segment
from segue.attention.tree.node import Node
from segue.workers.rows.forms import StructuredOutputs
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import CompletionOutput
from segue.workers.sampling.ending import Finisher
from segue.workers.sampling.sample import Request, Sample

EOS = 2


def ended(text: str, **params: Any) -> CompletionOutput:
    """The answer of a model that says this, a byte a token."""
    finisher = Finisher(tiny_tokenizer(), frozenset({EOS}), 512)
    request = Request(0, (Segment((5,), False),), SamplingParams(**params), b"", 0, Node.__new__(Node))
    sample = Sample(request, 0, request.root)
    for token in tiny_tokenizer()(text, add_special_tokens=False).input_ids:
        finisher.append(sample, token)
        if sample.finish_reason:
            break
    return finisher.output(sample)


@pytest.mark.parametrize(
    ("params", "text", "num_tokens"),
    [
        ({"stop": ("ab",)}, "", 2),
        ({"stop": ("ab",), "min_tokens": 1}, "", 2),  # it ends after the first token
        ({"stop": ("ab",), "min_tokens": 2}, "abx", 5),  # the first one ends with the second token: not looked at
        ({"stop": ("ab",), "min_tokens": 4}, "abx", 5),
        ({"stop": ("ab",), "min_tokens": 5}, "abxaby", 8),
        ({"stop": ("ab", "x"), "min_tokens": 2}, "ab", 3),
        ({"stop": ("y", "ab"), "min_tokens": 3}, "abx", 5),
        ({"stop": ("ab",), "min_tokens": 2, "include_stop_str_in_output": True}, "abxab", 5),
    ],
)
def test_stop_string_cuts_only_what_ends_after_min_tokens(params, text, num_tokens):
    answer = ended("abxabyab", max_tokens=9, **params)
    assert (answer.text, len(answer.token_ids), answer.finish_reason) == (text, num_tokens, "stop")


def test_stop_string_within_min_tokens_alone_cuts_nothing():
    answer = ended("abxabyab", max_tokens=8, min_tokens=8, stop=("ab",))
    assert (answer.text, answer.finish_reason) == ("abxabyab", "length")


def test_stop_string_longer_than_the_window_of_tokens_is_found_after_min_tokens():
    stop = "ab" * 50
    assert ended("x" + stop + "y" + stop, max_tokens=300, stop=(stop,), min_tokens=101).text == "x" + stop + "y"


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(1, "a"), (2, "a"), (3, "aé"), (4, "aé"), (5, "aé"), (6, "aé日"), (7, "aé日"), (9, "aé日")]
)
def test_answer_cut_inside_a_character_ends_before_it_and_says_so(num_bytes, text):
    answer = ended("aé日🙂", max_tokens=num_bytes)
    assert (answer.text, answer.finish_reason) == (text, "length")
    assert answer.ends_inside_character == (num_bytes > len(text.encode()))


def test_form_that_ends_with_the_replacement_character_keeps_it():
    params = SamplingParams(max_tokens=9, structured_outputs=StructuredOutputs(choice=("a\ufffd",)))
    answer = tiny_engine().generate([[Segment((5, 6), True)]], params)[0].outputs[0]
    assert (answer.text, answer.finish_reason, answer.ends_inside_character) == ("a\ufffd", "stop", False)
