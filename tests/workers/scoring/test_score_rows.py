"""Rows of scoring jobs to what is scored of them: what is wrong with a row stays its own error."""

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from render_specs import TEXT, render_spec

from segue.attention.segments import Segment, num_tokens
from segue.pipeline.dataset.blocks import block_of
from segue.pipeline.ledger.chains import decode_chain
from segue.pipeline.ledger.units import score_row
from segue.pipeline.prompts.check import checked_encoder
from segue.pipeline.prompts.render import render_block
from segue.workers.models.echo import CONTROL_TOKENS, echo_tokenizer
from segue.workers.prompts.template import PromptTemplate
from segue.workers.scoring.rows import ScoreRow
from segue.workers.scoring.template import ScoringTemplate

PREFIX = echo_tokenizer().eos_token_id  # no BOS: EOS stands for an empty context
MAX_MODEL_LEN = 40


def rendered(columns: dict[str, Any], task: str, template: PromptTemplate = TEXT, **changes: Any) -> list[dict]:
    table = pa.table(columns)
    names = tuple(table.column_names)
    spec = render_spec(template, **{"task": task, "max_model_len": MAX_MODEL_LEN, "prompt_columns": names, **changes})
    return render_block(block_of(table, "a.parquet", 0), spec).to_pylist()


def read(columns: dict[str, Any], task: str, *args: Any, **changes: Any) -> list[ScoreRow]:
    rows = rendered(columns, task, *args, **changes)
    assert [row["error"] for row in rows] == [None] * len(rows)
    return [score_row(decode_chain(row["chain"]), row["score"]) for row in rows]


def code(columns: dict[str, Any], task: str, **changes: Any) -> str | None:
    (row,) = rendered(columns, task, **changes)
    assert (row["chain"] == b"") == (row["score"] is None) == (row["error"] is not None)
    return row["error"] and row["error"]["code"]


def text_of(token_ids: tuple[int, ...]) -> str:
    return echo_tokenizer().decode(list(token_ids))


def choose(choices: Any, label: Any = None, prompt: Any = "ab", **changes: Any) -> str | None:
    kinds = {"prompt": pa.string(), "choices": pa.list_(pa.string())}
    columns = {"prompt": pa.array([prompt], kinds["prompt"]), "choices": pa.array([choices], kinds["choices"])}
    return code(columns | ({} if label is None else {"label": [label]}), "choose", **changes)


def test_choices_follow_a_space_and_share_their_context():
    (row,) = read({"prompt": ["ab"], "choices": [["x", "yz"]], "label": [1]}, "choose")
    assert [text_of(tokens) for tokens in row.continuations] == [" x", " yz"]
    assert text_of(row.context[0].token_ids) == "ab"
    assert (row.sizes, row.label) == ((1, 2), 1)


def test_tokenizer_without_a_token_to_begin_with_is_refused_for_scoring_before_anything_starts(monkeypatch):
    nothing = SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=None, eos_token_id=None))
    monkeypatch.setattr("segue.pipeline.prompts.check.encoder_of", lambda spec: nothing)
    assert checked_encoder(render_spec(TEXT)) is nothing
    with pytest.raises(ValueError, match="BOS or EOS token, got neither"):
        checked_encoder(render_spec(TEXT, task="choose"))


@pytest.mark.parametrize("prompt", ["", "   "])
def test_blank_context_is_the_prefix_token_and_its_space_goes_to_the_choice(prompt):
    (row,) = read({"prompt": [prompt], "choices": [["x"]]}, "choose")
    assert row.context == (Segment((PREFIX,), False),)
    assert text_of(row.continuations[0]) == f"{prompt} x"


def test_choices_of_the_job_may_name_columns_and_need_no_column_of_their_own():
    scoring = ScoringTemplate(choices=("{one}", "no"), target_delimiter="=")
    (row,) = read({"prompt": ["ab"], "one": [7]}, "choose", scoring=scoring)
    assert [text_of(tokens) for tokens in row.continuations] == ["=7", "=no"]


def test_label_may_be_the_text_of_a_choice():
    rows = read({"prompt": ["a", "b"], "choices": [["x", "y"]] * 2, "label": ["y", None]}, "choose")
    assert [row.label for row in rows] == [1, None]


@pytest.mark.parametrize(
    ("label", "wanted"),
    [("1", 1), (" 0", 0), ("", None), (" ", None), ("-1", None), (-1, None), ("y", 1)],
)
def test_label_is_read_as_lm_evaluation_harness_reads_it(label, wanted):
    """HellaSwag's labels are digits as text, and empty where they are kept secret; others have -1."""
    (row,) = read({"prompt": ["a"], "choices": [["x", "y"]], "label": [label]}, "choose")
    assert row.label == wanted


def test_label_that_is_a_choice_of_digits_is_that_choice_and_not_its_position():
    rows = read({"prompt": ["a"] * 2, "choices": [["2", "1", "0"]] * 2, "label": ["2", "0"]}, "choose")
    assert [row.label for row in rows] == [0, 2]


def test_choice_after_a_chat_follows_its_generation_header_without_a_space():
    (row,) = read({"prompt": ["ab"], "choices": [["x"]]}, "choose", PromptTemplate())
    assert text_of(row.continuations[0]) == "x"
    assert text_of(row.context[-1].token_ids).endswith("assistant\n")


def test_choices_under_the_segment_mask_are_never_bidirectional():
    (row,) = read({"prompt": ["ab"], "choices": [["xy"]]}, "choose", PromptTemplate(), mask="segment")
    chain = decode_chain(
        rendered({"prompt": ["ab"], "choices": [["xy"]]}, "choose", PromptTemplate(), mask="segment")[0]["chain"]
    )
    assert any(segment.bidirectional for segment in row.context)
    assert not chain[-1].bidirectional
    assert num_tokens(chain) == num_tokens(row.context) + 1  # the last token is not fed


def test_control_tokens_in_a_choice_are_text():
    (row,) = read({"prompt": ["ab"], "choices": [[CONTROL_TOKENS[0]]]}, "choose")
    assert not set(row.continuations[0]) & set(echo_tokenizer().convert_tokens_to_ids(list(CONTROL_TOKENS)))


def test_rows_with_odd_choices_are_right_or_have_an_error():
    assert choose(None) == "BAD_CHOICES"
    assert choose([]) == "BAD_CHOICES"
    assert choose(["x", None]) == "BAD_CHOICES"
    assert choose(["x"]) is None
    assert choose([str(n) for n in range(500)]) is None
    assert choose(["x", ""]) is None  # the space before it is scored
    assert choose(["x", ""], scoring=ScoringTemplate(target_delimiter="")) == "BAD_CHOICES"
    assert choose(["x"], prompt=None) == "NULL_PROMPT"


def test_label_that_is_none_of_the_choices_is_a_row_error():
    assert choose(["x", "y"], 1) is None
    assert choose(["x", "y"], 2) == "BAD_LABEL"
    assert choose(["x", "y"], -2) == "BAD_LABEL"
    assert choose(["x", "y"], "2") == "BAD_LABEL"
    assert choose(["x", "y"], "1.0") == "BAD_LABEL"
    assert choose(["x", "y"], "9" * 30) == "BAD_LABEL"
    assert choose(["x", "y"], "z") == "BAD_LABEL"
    assert choose(["x", "x"], "x") == "BAD_LABEL"  # which of the two?


def test_continuation_that_fills_the_context_is_scored_and_one_more_is_a_row_error():
    fits = "y" * (MAX_MODEL_LEN + 1 - len("ab "))
    assert choose(["x", fits]) is None
    assert choose(["x", fits + "y"]) == "PROMPT_TOO_LONG"
    assert code({"prompt": [""], "continuation": ["y" * MAX_MODEL_LEN]}, "loglikelihood") is None
    assert code({"prompt": ["ab"], "continuation": ["y" * MAX_MODEL_LEN]}, "loglikelihood") == "PROMPT_TOO_LONG"


def test_continuation_is_scored_as_it_is():
    columns = {"prompt": ["ab"], "answer": ["xy"]}
    (row,) = read(columns, "loglikelihood", scoring=ScoringTemplate(continuation_column="answer"))
    assert [text_of(tokens) for tokens in row.continuations] == ["xy"]
    (row,) = read(columns, "loglikelihood", scoring=ScoringTemplate(continuation=" {answer}!"))
    assert [text_of(tokens) for tokens in row.continuations] == [" xy!"]
    assert code({"prompt": ["ab"], "continuation": [""]}, "loglikelihood") == "EMPTY_PROMPT"
    assert code({"prompt": ["ab"], "continuation": pa.nulls(1)}, "loglikelihood") == "NULL_PROMPT"


def test_text_of_any_length_is_scored_and_knows_its_words_and_bytes():
    text = "größer als das Fenster " * 10
    (row,) = read({"prompt": [text]}, "perplexity")
    assert text_of(row.continuations[0]) == text
    assert row.sizes == (41, len(text.encode()))  # re.split counts the end after the last space, as lm-eval does
    assert code({"prompt": [""]}, "perplexity") == "EMPTY_PROMPT"
    assert code({"prompt": pa.nulls(1)}, "perplexity") == "NULL_PROMPT"


def test_prompt_to_learn_from_keeps_its_last_space_as_it_is_answered():
    columns = {"prompt": ["ab "], "continuation": ["xy"]}
    (learned,) = read(columns, "finetune")
    (scored,) = read(columns, "loglikelihood")
    assert (text_of(learned.context[0].token_ids), text_of(learned.continuations[0])) == ("ab ", "xy")
    assert (text_of(scored.context[0].token_ids), text_of(scored.continuations[0])) == ("ab", " xy")


def test_answer_to_learn_must_leave_room_for_the_token_that_ends_it():
    assert code({"prompt": ["ab"], "continuation": ["y" * (MAX_MODEL_LEN - 2)]}, "finetune") is None
    assert code({"prompt": ["ab"], "continuation": ["y" * (MAX_MODEL_LEN - 1)]}, "finetune") == "PROMPT_TOO_LONG"


def test_nothing_is_learned_after_an_empty_prompt():
    assert code({"prompt": ["ab"], "continuation": ["x"]}, "finetune") is None
    assert code({"prompt": [" "], "continuation": ["x"]}, "finetune") == "EMPTY_PROMPT"
    columns = {"prompt": ["ab"], "continuation": ["x"]}
    assert code(columns, "finetune", template=PromptTemplate(format="text", text="")) == "EMPTY_PROMPT"
