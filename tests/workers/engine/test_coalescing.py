"""Rows that ask the same: computed once where the answer is certain to be equal, and not where it is drawn."""

from tiny_engines import kv_bytes, tiny_engine

from segue.attention.segments import Segment
from segue.workers.rows.params import SamplingParams

PROMPT = [Segment(tuple(range(3, 40)), True), Segment((9, 8), False)]
OTHER = [Segment(tuple(range(3, 40)), True), Segment((9, 7), False)]
NUM_TOKENS = 39


def test_equal_greedy_rows_are_computed_once_and_answered_each():
    subject, params = tiny_engine(), SamplingParams(max_tokens=5, ignore_eos=True)
    first, second, third, other = subject.generate([PROMPT, PROMPT, PROMPT, OTHER], params)
    assert first.outputs == second.outputs == third.outputs
    # The other row, which shares all but a token, ran first.
    assert [output.num_cached_tokens for output in (first, second, third)] == [NUM_TOKENS - 1, NUM_TOKENS, NUM_TOKENS]
    assert other.outputs[0].token_ids == tiny_engine().generate([OTHER], params)[0].outputs[0].token_ids
    assert subject.stats.num_generated_tokens == 2 * 5
    assert (subject.stats.num_rows, subject.stats.num_finished_rows) == (4, 4)


def test_equal_rows_under_other_parameters_are_computed_for_themselves():
    subject = tiny_engine()
    rows = subject.generate([PROMPT, PROMPT], [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 4)])
    assert [len(row.outputs[0].token_ids) for row in rows] == [2, 4]
    assert subject.stats.num_generated_tokens == 6


def test_equal_sampled_rows_draw_for_themselves():
    params = SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True)
    first, second = tiny_engine().generate([PROMPT, PROMPT], params)
    assert first.outputs[0].token_ids != second.outputs[0].token_ids


def test_equal_rows_without_reuse_are_computed_each():
    subject = tiny_engine(enable_prefix_caching=False)
    subject.generate([PROMPT, PROMPT], SamplingParams(max_tokens=1))
    assert subject.stats.num_computed_tokens == 2 * NUM_TOKENS


def test_equal_rows_that_cannot_run_each_have_the_error():
    subject = tiny_engine(kv_cache_memory_bytes=kv_bytes(10))
    rows = subject.generate([PROMPT, PROMPT], SamplingParams(max_tokens=1))
    assert [row.error and row.error.code for row in rows] == ["ROW_OOM", "ROW_OOM"]
    assert subject.stats.num_errors == 2


def test_logits_of_equal_prompts_are_given_for_each():
    rows = tiny_engine().logits([PROMPT, OTHER, PROMPT])
    assert rows.shape[0] == 3
    assert rows[0].equal(rows[2])
    assert not rows[0].equal(rows[1])
