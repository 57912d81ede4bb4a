"""Parameters that name tokens or words: logit_bias, allowed_token_ids and bad_words, as vLLM means them."""

from itertools import pairwise
from string import ascii_letters

import pytest
from tiny_engines import tiny_engine
from tiny_models import oracle_logits, oracle_model, tiny_tokenizer

from segue.attention.segments import Segment
from segue.workers.rows.params import SamplingParams
from segue.workers.sampling.bad_words import BadWords, ends_of

ROW = [Segment((5, 6, 7), True)]


def answer(**params):
    output = tiny_engine().generate([ROW], {"max_tokens": 8, "ignore_eos": True, **params})[0]
    assert output.error is None
    return output.outputs[0].token_ids


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({5: 1.5}, ((5, 1.5),)),
        ({"5": 1, "3": -2}, ((3, -2.0), (5, 1.0))),
        ({"5": 1e9, "6": -101}, ((5, 100.0), (6, -100.0))),
        ([["5", 1.0], [4, 2.0]], ((4, 2.0), (5, 1.0))),  # as an Arrow map has it
        ({"5": None, "6": 1.0}, ((6, 1.0),)),  # as an Arrow struct has it
        (None, ()),
        ({}, ()),
    ],
)
def test_logit_bias_is_read_as_json_and_arrow_write_it(given, kept):
    params = SamplingParams.model_validate({"logit_bias": given})
    assert params.logit_bias == kept
    assert params.with_row({"max_tokens": 3}).logit_bias == kept
    assert SamplingParams.model_validate_json(params.model_dump_json()) == params


def test_logit_bias_is_added_to_the_logits():
    logits = oracle_logits(oracle_model(), ROW)[-1]
    best, second = logits.topk(2).indices.tolist()
    gap = float(logits[best] - logits[second])
    assert answer(max_tokens=1, logit_bias={second: gap + 0.01}) == [second]
    assert answer(max_tokens=1, logit_bias={second: gap - 0.01}) == [best]
    assert answer(max_tokens=1, logit_bias={str(best): -100}) == [second]
    assert answer(logit_bias={second: 100}) == [second] * 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_drawn(temperature):
    allowed = [40, 3, 271]
    said = answer(allowed_token_ids=allowed, temperature=temperature, max_tokens=30)
    assert {*said} <= {*allowed}
    assert temperature == 0 or len({*said}) > 1
    logits = oracle_logits(oracle_model(), ROW)[-1]
    assert temperature > 0 or said[0] == max(allowed, key=lambda token: float(logits[token]))


def test_word_that_is_bad_is_not_completed():
    params = {"max_tokens": 200, "temperature": 1.0, "seed": 3}
    free = answer(**params)
    letters = {token: letter for letter in ascii_letters for token in tiny_tokenizer()(letter).input_ids}
    place = next(i for i in range(1, 200) if free[i - 1] in letters and free[i] in letters)
    word = letters[free[place - 1]] + letters[free[place]]
    said = answer(bad_words=("x" * 3, word), **params)
    assert said[:place] == free[:place]
    assert said[place] != free[place]
    assert (free[place - 1], free[place]) not in {*pairwise(said)}


def test_bad_words_of_a_byte_each_are_never_said():
    said = answer(bad_words=tuple(ascii_letters), temperature=3.0, max_tokens=100)
    banned = {token for letter in ascii_letters for token in tiny_tokenizer()(letter).input_ids}
    assert banned.isdisjoint(said)
    assert not banned.isdisjoint(answer(temperature=3.0, max_tokens=100))


@pytest.mark.parametrize(
    ("said", "ends"),
    [([], {9}), ([1], {9, 2}), ([1, 2], {9, 3}), ([2, 1], {9, 2}), ([1, 2, 3], {9}), ([3, 1, 2], {9, 3})],
)
def test_token_that_would_complete_a_bad_word_is_known(said, ends):
    assert ends_of([(9,), (1, 2), (1, 2, 3)], said) == ends


def test_bad_word_in_the_middle_of_a_text_is_bad_too_where_a_space_makes_it_another_token():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"war": 0, "Ġwar": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words = BadWords(PreTrainedTokenizerFast(tokenizer_object=backend), 3)
    assert words.ids_of(("war",)) == ((0,), (1,))
    assert words.ids_of((" war", "war")) == ((0,), (1,))


@pytest.mark.parametrize("num_samples", [2, 4])
def test_greedy_samples_of_a_row_are_drawn_once(num_samples):
    subject = tiny_engine()
    params = SamplingParams(n=num_samples, max_tokens=8, ignore_eos=True, logprobs=1)
    output = subject.generate([ROW], params)[0]
    assert [sample.index for sample in output.outputs] == list(range(num_samples))
    alone = tiny_engine().generate([ROW], SamplingParams(max_tokens=8, ignore_eos=True))
    assert [sample.token_ids for sample in output.outputs] == [alone[0].outputs[0].token_ids] * num_samples
    assert subject.stats.num_generated_tokens == 8
