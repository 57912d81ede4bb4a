"""What `Engine.generate` and `chat` take: one prompt or many, and parameters, in every form that vLLM takes."""

import numpy as np
import pytest
import torch
from tiny_engines import tiny_engine, token_ids
from tiny_models import tiny_tokenizer

from segue.attention.segments import Segment
from segue.workers.rows.params import SamplingParams

PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)
HELLO = tiny_tokenizer()("Hello").input_ids
CHAT = [{"role": "user", "content": "Hello"}]
OTHER_CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Bye"}]


def prompts_answered(given, **arguments):
    """(text, token ids) of each prompt that was answered."""
    outputs = tiny_engine(mask="causal").generate(given, PARAMS, **arguments)
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [(output.prompt, output.prompt_token_ids) for output in outputs]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Hello", [("Hello", HELLO)]),
        (["Hello"], [("Hello", HELLO)]),
        (("Hello", "Hello"), [("Hello", HELLO)] * 2),
        (iter(["Hello"]), [("Hello", HELLO)]),
        (np.array(["Hello"]), [("Hello", HELLO)]),
        ({"prompt": "Hello"}, [("Hello", HELLO)]),
        ([{"prompt": "Hello"}, "Hello"], [("Hello", HELLO)] * 2),
        (HELLO, [(None, HELLO)]),
        (tuple(HELLO), [(None, HELLO)]),
        (np.array(HELLO), [(None, HELLO)]),
        (torch.tensor(HELLO), [(None, HELLO)]),
        ([np.int64(5), 6], [(None, [5, 6])]),
        ([HELLO, [5, 6]], [(None, HELLO), (None, [5, 6])]),
        (torch.tensor([HELLO, HELLO]), [(None, HELLO)] * 2),
        ({"prompt_token_ids": HELLO}, [(None, HELLO)]),
        ([{"prompt_token_ids": [5]}, [5, 6]], [(None, [5]), (None, [5, 6])]),
        ({"prompt": "H", "prompt_token_ids": [5]}, [("H", [5])]),
        ({"prompt": None, "prompt_token_ids": [5]}, [(None, [5])]),
        ([Segment((5,), False), Segment((6,), True)], [(None, [5, 6])]),
        ([[Segment((5,), False)], "Hello"], [(None, [5]), ("Hello", HELLO)]),
        ([], []),
    ],
)
def test_prompt_in_any_form_is_one_prompt_or_many(given, wanted):
    assert prompts_answered(given) == wanted


def test_chat_is_one_prompt_and_a_list_of_chats_is_many():
    first, second = prompts_answered([CHAT, OTHER_CHAT])
    assert prompts_answered(CHAT) == [first]
    assert prompts_answered(OTHER_CHAT) == [second]
    assert prompts_answered([CHAT]) == [first]
    assert prompts_answered([CHAT, "Hello"]) == [first, ("Hello", HELLO)]
    assert "Hello" in tiny_tokenizer().decode(first[1])
    assert first[0] is None


def test_chat_call_answers_as_generate_and_takes_the_template_of_the_call():
    engine = tiny_engine(mask="causal")
    assert token_ids(engine.chat(CHAT, PARAMS)) == token_ids(engine.generate(CHAT, PARAMS))
    both = engine.chat([CHAT, OTHER_CHAT], sampling_params={"max_tokens": 5, "ignore_eos": True})
    assert token_ids(both) == token_ids(engine.generate([CHAT, OTHER_CHAT], PARAMS))
    template = "{% for message in messages %}- {{ message.content }}\n{% endfor %}"
    (other,) = engine.chat(CHAT, PARAMS, chat_template=template)
    assert other.prompt_token_ids == tiny_tokenizer()("- Hello\n").input_ids
    begun = [*CHAT, {"role": "assistant", "content": "He"}]
    (continued,) = engine.chat(begun, PARAMS, continue_final_message=True)
    assert str(tiny_tokenizer().decode(continued.prompt_token_ids)).endswith("He")
    with pytest.raises(ValueError, match="chat_templat"):
        engine.chat(CHAT, PARAMS, chat_templat=template)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ("", "EMPTY_PROMPT"),
        (" \n", "EMPTY_PROMPT"),
        ([], "EMPTY_PROMPT"),
        ({"prompt_token_ids": []}, "EMPTY_PROMPT"),
        (None, "NULL_PROMPT"),
        (5, "BAD_PROMPT"),
        (1.5, "BAD_PROMPT"),
        (True, "BAD_PROMPT"),
        (b"secret", "BAD_PROMPT"),
        ([5, "secret"], "BAD_PROMPT"),
        ([5, True], "BAD_PROMPT"),
        ([5, 320], "BAD_PROMPT"),
        ([-1], "BAD_PROMPT"),
        ([[5]], "BAD_PROMPT"),
        ({}, "BAD_PROMPT"),
        ({"prompt": "x", "secret": 1}, "BAD_PROMPT"),
        ({"prompt": 5}, "BAD_PROMPT"),
        ({"prompt_token_ids": "secret"}, "BAD_PROMPT"),
        ({"prompt_token_ids": [1.5]}, "BAD_PROMPT"),
        ("a\ud800", "BAD_UNICODE"),
        ([{"role": "secret", "content": "x"}], "BAD_MESSAGES"),
        ([{"role": "user"}], "BAD_MESSAGES"),
        ([{"role": "user", "content": "x"}, "secret"], "BAD_MESSAGES"),
    ],
)
def test_prompt_that_cannot_be_read_is_an_output_with_its_error_beside_good_ones(bad, code):
    outputs = tiny_engine(mask="causal").generate(["Hello", bad, CHAT], PARAMS)
    assert [output.error and str(output.error.code) for output in outputs] == [None, code, None]
    assert "secret" not in str(outputs[1].error)
    assert outputs[1].outputs == []
    good = tiny_engine(mask="causal").generate(["Hello", CHAT], PARAMS)
    assert token_ids([outputs[0], outputs[2]]) == token_ids(good)


def test_chat_that_is_none_is_an_output_with_its_error():
    outputs = tiny_engine(mask="causal").chat([CHAT, "secret", [], CHAT], PARAMS)
    codes = [output.error and str(output.error.code) for output in outputs]
    assert codes == [None, "BAD_MESSAGES", "BAD_MESSAGES", None]


@pytest.mark.parametrize(
    "arguments",
    [
        {"params": {"max_tokens": 5, "ignore_eos": True}},
        {"sampling_params": PARAMS},
        {"sampling_params": {"max_tokens": 5, "ignore_eos": True}},
        {"sampling_params": [PARAMS, {"max_tokens": 5, "ignore_eos": True}]},
        {"params": PARAMS, "use_tqdm": True},
    ],
)
def test_parameters_may_be_given_as_to_vllm(arguments):
    engine = tiny_engine(mask="causal")
    wanted = engine.generate(["Hello", "Bye"], PARAMS)
    assert token_ids(engine.generate(["Hello", "Bye"], **arguments)) == token_ids(wanted)


def test_parameters_of_one_prompt_that_are_wrong_are_the_error_of_its_output():
    outputs = tiny_engine(mask="causal").generate(["Hello", "Bye", "x"], [PARAMS, {"max_tokens": "secret"}, None])
    assert [output.error and str(output.error.code) for output in outputs] == [None, "BAD_PARAMS", None]
    assert "secret" not in str(outputs[1].error)
    assert len(outputs[2].outputs[0].token_ids) <= SamplingParams().max_tokens


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"params": {"max_token": 5}}, "max_token"),
        ({"params": PARAMS, "sampling_params": PARAMS}, "two names of one argument"),
        ({"params": [PARAMS]}, "as many sampling params as prompts"),
        ({"params": [PARAMS, "x"]}, "got str"),
        ({"params": "x"}, "got str"),
    ],
)
def test_arguments_that_hold_for_all_prompts_are_refused_if_they_are_wrong(arguments, said):
    with pytest.raises((ValueError, TypeError), match=said):
        tiny_engine(mask="causal").generate(["Hello", "Bye"], **arguments)


def test_progress_bar_counts_every_row_also_those_with_an_error(capsys):
    totals = []

    class Bar:
        def __init__(self, total, **_):
            totals.append(total)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, number):
            totals.append(-number)

    tiny_engine(mask="causal").generate(["Hello", "", "Bye"], PARAMS, use_tqdm=Bar)
    assert totals[0] == 3
    assert sum(totals) == 0
    tiny_engine(mask="causal").generate("Hello", PARAMS, use_tqdm=True)
    assert "1/1" in capsys.readouterr().err


def test_logits_of_one_prompt_are_one_row():
    engine = tiny_engine(mask="causal")
    torch.testing.assert_close(engine.logits("Hello"), engine.logits([HELLO]))
    assert engine.logits("Hello").shape[0] == 1
