"""Log-likelihoods over the tree against transformers under the dense mask, whatever is shared."""

import copy

import pytest
import torch
from chains import chains, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engines import kv_bytes, memory_of, steps_to_the_end, tiny_engine
from tiny_models import oracle_logits, oracle_model, tiny_model, tiny_tokenizer

from segue.attention.segments import Segment, num_tokens
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.errors import RowError
from segue.workers.models.tree_model import tree_model
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import GenerationRequest, ScoringRequest
from segue.workers.scoring import likelihood as score
from segue.workers.scoring.likelihood import score_tokens
from segue.workers.scoring.windows import rolling_windows

pytestmark = pytest.mark.usefixtures("each_backend")

TOLERANCE = 1e-4


def oracle_score(context, continuation, mask="segment"):
    """(logprob, is_greedy) from one forward of transformers' own model."""
    chain = context if mask == "segment" else [Segment(segment.token_ids, False) for segment in context]
    logprobs = oracle_logits(oracle_model(), chain, tuple(continuation)).log_softmax(-1)
    start = num_tokens(chain) - 1
    picked = [float(logprobs[start + i, token]) for i, token in enumerate(continuation)]
    greedy = [int(logprobs[start + i].argmax()) == token for i, token in enumerate(continuation)]
    return sum(picked), all(greedy)


def assert_scores(subject, pairs, mask="segment"):
    for (context, continuation), got in zip(pairs, subject.loglikelihood(pairs), strict=True):
        logprob, is_greedy = oracle_score(context, continuation, mask)
        assert got.logprob == pytest.approx(logprob, abs=TOLERANCE * len(continuation))
        assert (got.is_greedy, got.num_tokens) == (is_greedy, len(continuation))


@given(
    contexts=chains(max_rows=4),
    choices=st.lists(tokens, min_size=1, max_size=5),
    mask=st.sampled_from(["segment", "causal"]),
    budget=st.sampled_from([5, 2048]),
)
@settings(deadline=None, max_examples=40)
def test_scores_of_choices_below_random_contexts_equal_transformers(contexts, choices, mask, budget):
    pairs = [(context, choice) for context in contexts for choice in choices]
    assert_scores(tiny_engine(mask=mask, max_num_batched_tokens=budget, max_num_seqs=3), pairs, mask)


def test_score_of_a_long_text_over_a_large_vocabulary_is_that_of_double_precision():
    """Errors of one sign would add up: 600 tokens were off by 4e-3."""
    own = tiny_model("llama", vocab_size=49_152, max_position_embeddings=1024)
    with torch.no_grad():
        own.lm_head.weight.mul_(3)  # logits as far apart as those of a trained model
    exact = copy.deepcopy(own).double()
    context = [Segment((1, 2), False)]
    text = tuple(torch.randint(3, 49_152, (600,), generator=torch.Generator().manual_seed(0)).tolist())
    (score,) = Engine(tree_model(own, tiny_tokenizer()), EngineConfig(mask="causal")).loglikelihood([(context, text)])
    with torch.no_grad():
        logprobs = exact(torch.tensor([[1, 2, *text[:-1]]])).logits[0, 1:].log_softmax(-1)
    wanted = float(logprobs[torch.arange(600), list(text)].sum())
    assert score.logprob == pytest.approx(wanted, abs=1e-4)


@given(rows=chains(max_rows=4), choices=st.lists(tokens, min_size=1, max_size=4), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=30)
def test_scores_in_an_engine_that_has_computed_other_rows_equal_transformers(rows, choices, seed):
    """What was computed for other rows, scored or not, cut or not, must not change or miss a score."""
    subject = tiny_engine(mask="causal")
    longer = [(*row, Segment(choice, False)) for row in rows for choice in choices]
    subject.generate(longer[seed::2] or longer, SamplingParams(max_tokens=1))
    pairs = [(row, choice) for row in rows for choice in choices]
    assert_scores(subject, pairs[::2] or pairs, "causal")
    assert_scores(subject, [(context, choice[:1]) for context, choice in pairs], "causal")
    assert_scores(subject, [(context, (*choice, 7, 8)) for context, choice in pairs], "causal")


def test_scores_compute_context_once_and_never_feed_the_last_token():
    subject = tiny_engine()
    context = [Segment(tuple(range(3, 40)), True), Segment((9, 8), False)]
    subject.loglikelihood([(context, (50, 51, 52)), (context, (50, 51, 53)), (context, (60,)), (context, (61,))])
    assert subject.stats.num_computed_tokens == 37 + 2 + 2  # context, header, "50 51"


def test_scores_of_the_same_pair_twice_are_computed_once():
    subject = tiny_engine()
    pair = ([Segment((5, 6, 7), True)], (8, 9, 10))
    first, second = subject.loglikelihood([pair, pair])
    assert first == second
    assert subject.stats.num_computed_tokens == 5


def test_greedy_continuation_is_told_from_others():
    subject = tiny_engine()
    context = [Segment((5, 6, 7), True)]
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    best = subject.generate([context], params)[0].outputs[0].token_ids
    other = [*best[:-1], (best[-1] + 1) % 300]
    assert [s.is_greedy for s in subject.loglikelihood([(context, best), (context, other)])] == [True, False]


def test_scores_are_the_same_whatever_the_size_of_logit_chunks(monkeypatch):
    pairs = [([Segment((5, 6, 7), True)], tuple(range(20, 20 + n))) for n in range(1, 9)]
    wanted = tiny_engine().loglikelihood(pairs)
    monkeypatch.setattr(score, "MAX_LOGITS", 640)  # two positions at a time
    for got, expected in zip(tiny_engine().loglikelihood(pairs), wanted, strict=True):
        assert got.logprob == pytest.approx(expected.logprob, abs=TOLERANCE)


def test_scores_and_generation_in_one_engine_do_not_disturb_each_other():
    context = [Segment(tuple(range(3, 20)), True)]
    subject = tiny_engine()
    subject.add("generated", GenerationRequest(context, SamplingParams(max_tokens=6), b"0"))
    subject.add("scored", ScoringRequest(context, (30, 31, 32)))
    outputs = {output.request_id: output for output in steps_to_the_end(subject)}
    scored = outputs["scored"].score
    assert scored is not None
    assert scored.logprob == pytest.approx(oracle_score(context, (30, 31, 32))[0], abs=1e-3)
    alone = tiny_engine().generate([context], SamplingParams(max_tokens=6))[0]
    assert outputs["generated"].outputs[0].token_ids == alone.outputs[0].token_ids


def test_scores_in_short_memory_equal_those_in_ample_memory():
    contexts = [[Segment(tuple(range(3 + i, 30 + i)), True)] for i in range(6)]
    pairs = [(context, tuple(range(40, 50 + i))) for context in contexts for i in range(3)]
    tight = tiny_engine(kv_cache_memory_bytes=kv_bytes(60))
    wanted = tiny_engine().loglikelihood(pairs)
    for got, expected in zip(tight.loglikelihood(pairs), wanted, strict=True):
        assert got.logprob == pytest.approx(expected.logprob, abs=TOLERANCE)


def test_all_structure_is_gone_after_scoring_without_reuse():
    subject = tiny_engine(enable_prefix_caching=False)
    subject.loglikelihood([([Segment((5, 6), True)], (7, 8, 9))] * 3)
    assert list(subject.core.nodes) == []
    assert memory_of(subject).allocated_bytes == 0


def test_continuation_over_tokens_that_were_computed_without_scores_leaves_no_node_behind():
    subject = tiny_engine()
    for prompt in ([Segment((5, 6), False)], [Segment((5, 6, 7, 8), False)]):
        subject.generate([prompt], SamplingParams(max_tokens=1))
    subject.loglikelihood([([Segment((5, 6), False)], (7, 8, 9, 10))])
    subject.core.nodes.make_room(memory_of(subject).budget_tokens)
    assert list(subject.core.nodes) == []


def test_continuation_that_fills_the_context_is_scored_and_one_more_is_refused():
    subject = tiny_engine(max_model_len=20)
    context = [Segment((5, 6, 7), True)]
    assert_scores(subject, [(context, tuple(range(10, 28)))])  # 3 + 18 = max_model_len and the last
    with pytest.raises(RowError, match="22 tokens, wanted at most 21"):
        subject.loglikelihood([(context, tuple(range(10, 29)))])


@pytest.mark.parametrize("continuation", ["", ()])
def test_empty_continuation_is_a_row_error(continuation):
    with pytest.raises(RowError, match="continuation has no tokens"):
        tiny_engine().loglikelihood([("context", continuation)])


# -- text, as lm-evaluation-harness joins it


def test_scores_put_each_hidden_state_through_the_vocabulary_once():
    """Four choices after one context begin at the same hidden state; one of them goes on."""
    subject = tiny_engine()
    context = [Segment(tuple(range(3, 20)), True)]
    assert_scores(subject, [(context, (50,)), (context, (51,)), (context, (52,)), (context, (53, 54))])
    assert subject.stats.num_scored_positions == 2


def test_of_equal_logits_the_first_token_is_the_greedy_one():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    hidden, rows = torch.zeros(1, 2), torch.tensor([0, 0, 0])
    logprobs, is_greedy = score_tokens(hidden, rows, torch.tensor([2, 1, 0]), lambda states: logits, 4)
    assert is_greedy.tolist() == [False, True, False]
    assert logprobs[0] == logprobs[1] == pytest.approx(float(logits.log_softmax(-1)[0, 1]))


def test_error_of_one_pair_leaves_the_engine_usable():
    subject = tiny_engine(max_model_len=20)
    good = ([Segment((5, 6, 7), True)], (8, 9))
    with pytest.raises(RowError, match="max_model_len"):
        subject.loglikelihood([good, ([Segment((5, 6, 7), True)], tuple(range(10, 60)))])
    assert_scores(subject, [good])


def test_space_at_the_end_of_the_context_belongs_to_the_continuation():
    subject = tiny_engine(mask="causal")
    joined, spaced = subject.loglikelihood([("the sky is", " blue"), ("the sky is ", "blue")])
    assert joined == spaced
    assert joined.num_tokens == len(" blue")


def test_empty_context_is_the_prefix_token():
    subject = tiny_engine(mask="causal")
    eos = tiny_tokenizer().eos_token_id
    as_text = subject.loglikelihood([("", "blue")])[0]
    assert isinstance(eos, int)
    as_tokens = subject.loglikelihood([([Segment((eos,), False)], tiny_tokenizer()("blue").input_ids)])[0]
    assert as_text.logprob == pytest.approx(as_tokens.logprob, abs=TOLERANCE)
    assert as_text.num_tokens == as_tokens.num_tokens == len("blue")


def test_multi_byte_continuation_counts_its_tokens():
    got = tiny_engine(mask="causal").loglikelihood([("wie", " schön 🌧")])[0]
    assert got.num_tokens == len(" schön 🌧".encode())


def test_chat_context_is_rendered_and_the_continuation_follows_the_generation_header():
    subject = tiny_engine(mask="segment")
    chat = [{"role": "user", "content": "hello"}]
    chain = subject._prompt_encoder().encode_prompt(chat)
    wanted = subject.loglikelihood([(chain, tiny_tokenizer()("yes").input_ids)])[0]
    assert subject.loglikelihood([(chat, "yes")])[0].logprob == pytest.approx(wanted.logprob, abs=TOLERANCE)


# -- rolling windows


def lm_eval_rolling(token_list, prefix_token, max_seq_len, context_len):
    """lm_eval.utils.get_rolling_token_windows with make_disjoint_window, 0.4.13, as a second opinion."""
    if not token_list:
        return
    pred_len = max_seq_len - context_len + 1
    predicted = 0
    first_seq_len = min(max_seq_len, len(token_list))
    yield [prefix_token], token_list[:first_seq_len]
    predicted += first_seq_len
    while predicted < len(token_list):
        window_pred_len = min(len(token_list) - predicted, pred_len)
        window_end = predicted + window_pred_len
        a = token_list[window_end - max_seq_len - 1 : window_end - 1]
        b = token_list[window_end - window_pred_len : window_end]
        yield a[: len(a) - (len(b) - 1)], b
        predicted += window_pred_len


@given(length=st.integers(0, 60), size=st.integers(2, 20))
def test_rolling_windows_equal_those_of_lm_evaluation_harness(length, size):
    text = list(range(100, 100 + length))
    got = [(list(context), list(continuation)) for context, continuation in rolling_windows(text, 1, size)]
    assert got == [(list(a), list(b)) for a, b in lm_eval_rolling(text, 1, size, 1)]
    assert [token for _, continuation in got for token in continuation] == text


def long_text(length):
    return torch.randint(97, 122, (length,), generator=torch.Generator().manual_seed(0)).tolist()


def test_rolling_scores_of_a_long_text_equal_windows_of_transformers():
    text = long_text(100)
    subject = tiny_engine(mask="causal", max_model_len=32)
    (got,) = subject.loglikelihood_rolling([bytes(text).decode()])
    tokens = tiny_tokenizer()(bytes(text).decode()).input_ids
    wanted = 0.0
    prefix = tiny_tokenizer().eos_token_id
    assert isinstance(prefix, int)
    for context, continuation in rolling_windows(tokens, prefix, 32):
        logprobs = oracle_logits(oracle_model(), [Segment(context, False)], continuation).log_softmax(-1)
        wanted += sum(float(logprobs[len(context) - 1 + i, token]) for i, token in enumerate(continuation))
    assert got.logprob == pytest.approx(wanted, abs=1e-2)
    assert got.num_tokens == 100


def test_rolling_scores_keep_memory_flat_however_long_the_text():
    """What was held at most, and what is left: the first window alone may be another text's beginning."""
    held = []
    for length in (256, 2560):
        subject = tiny_engine(mask="causal", max_model_len=128, max_num_batched_tokens=128)
        subject.loglikelihood_rolling([bytes(long_text(length)).decode()])
        held.append((subject.stats.max_kv_bytes, memory_of(subject).allocated_bytes))
    assert held[0] == held[1]
    assert held[1][1] == kv_bytes(128)
