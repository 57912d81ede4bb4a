"""truncate_prompt_tokens: the last tokens of a prompt are used, and the number of the others is told."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo_jobs import rows_of, write_job
from hypothesis import given
from hypothesis import strategies as st
from in_process import run_here
from tiny_engines import shared_prompts, tiny_engine
from tiny_models import oracle_greedy, oracle_model, tiny_tree_model

from segue.attention.segments import Segment, last_tokens, num_tokens
from segue.workers.errors import RowError
from segue.workers.rows.params import SamplingParams

CHAIN = [Segment((1, 2, 3), True), Segment((4, 5), False), Segment((6, 7, 8, 9), True)]


@pytest.mark.parametrize(
    ("count", "left"),
    [
        (1, [Segment((9,), True)]),
        (4, [Segment((6, 7, 8, 9), True)]),
        (5, [Segment((5,), False), Segment((6, 7, 8, 9), True)]),
        (8, [Segment((2, 3), True), Segment((4, 5), False), Segment((6, 7, 8, 9), True)]),
        (9, CHAIN),
        (99, CHAIN),
    ],
)
def test_last_tokens_of_a_chain_are_the_end_of_the_segment_that_is_cut_and_those_after_it(count, left):
    assert list(last_tokens(CHAIN, count)) == left


@given(sizes=st.lists(st.integers(0, 5), max_size=6), count=st.integers(1, 30))
def test_last_tokens_are_the_last_of_all_tokens(sizes, count):
    chain = [Segment(tuple(range(10 * i, 10 * i + size)), i % 2 == 0) for i, size in enumerate(sizes)]
    every = [token for segment in chain for token in segment.token_ids]
    assert [token for segment in last_tokens(chain, count) for token in segment.token_ids] == every[-count:]


@pytest.mark.parametrize("mask", ["segment", "causal"])
def test_answer_after_truncation_is_that_of_the_last_tokens(mask):
    rows = shared_prompts(4)
    params = SamplingParams(max_tokens=8, truncate_prompt_tokens=33)
    for row, output in zip(rows, tiny_engine(mask=mask).generate(rows, params), strict=True):
        whole = [segment if mask == "segment" else Segment(segment.token_ids, False) for segment in row]
        left = last_tokens(whole, 33)
        assert output.num_truncated_tokens == num_tokens(row) - 33
        assert output.prompt_token_ids == [token for segment in left for token in segment.token_ids]
        wanted = oracle_greedy(oracle_model(), left, 8, tiny_tree_model().eos_token_ids)
        assert output.outputs[0].token_ids == wanted


def test_prompt_longer_than_the_context_is_cut_only_if_that_is_asked_for():
    prompts = [list(range(3, 203))] * 4
    each = [{"truncate_prompt_tokens": count} if count else {} for count in (None, -1, 40, 60)]
    outputs = tiny_engine(max_model_len=50).generate(prompts, [{"max_tokens": 20, **own} for own in each])
    codes = [output.error and str(output.error.code) for output in outputs]
    assert codes == ["PROMPT_TOO_LONG", None, None, "PROMPT_TOO_LONG"]
    assert [len(output.prompt_token_ids) for output in outputs[1:3]] == [30, 40]
    assert [output.num_truncated_tokens for output in outputs[1:3]] == [170, 160]
    short = tiny_engine(max_model_len=50).generate([5, 6], {"truncate_prompt_tokens": -1})[0]
    assert (short.prompt_token_ids, short.num_truncated_tokens) == ([5, 6], 0)


@pytest.mark.parametrize("wrong", [0, -2, 1.5])
def test_number_of_tokens_that_is_none_is_an_error_of_the_row(wrong):
    with pytest.raises(RowError, match="truncate_prompt_tokens"):
        SamplingParams().with_row({"truncate_prompt_tokens": wrong})


def test_job_and_rows_may_ask_for_truncation_and_a_column_says_what_was_taken_away(tmp_path):
    (tmp_path / "in").mkdir()
    own = [None, json.dumps({"truncate_prompt_tokens": 4}), json.dumps({"truncate_prompt_tokens": -1}), None]
    prompts = ["0123456789", "0123456789", "0123456789" * 3, "x" * 5]
    pq.write_table(pa.table({"prompt": prompts, "sampling_params": own}), tmp_path / "in" / "a.parquet")
    job = write_job(
        tmp_path,
        prompt={"format": "text"},
        sampling_params={"max_tokens": 12, "truncate_prompt_tokens": 7},
        limits={"max_model_len": 20},
    )
    run_here(job)
    rows = [row for _, row in sorted(rows_of(tmp_path / "out").items())]
    assert [row["generated_text"] for row in rows] == ["3456789", "6789", "23456789", "xxxxx"]
    assert [row["num_truncated_tokens"] for row in rows] == [3, 6, 22, 0]
    assert [row["num_input_tokens"] for row in rows] == [7, 4, 8, 5]
