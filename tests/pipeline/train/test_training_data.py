"""The rows of a plan as training examples: what is learned, what is held out, what is neither."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finetune_jobs import ROWS, finetune, training_data, write

from segue.pipeline.ledger.manifest import load_manifest
from segue.pipeline.train.examples import Holdout, load_training_data
from segue.pipeline.train.finetune import prepare_finetune
from segue.pipeline.train.process import NothingToTrain, train_process
from segue.workers.models.echo import echo_tokenizer
from segue.workers.training.ranks import Ranks

# Ray's own code warns of itself; what it says of our calls stays an error.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")


def text_of(example):
    """Its answer."""
    return echo_tokenizer().decode(example.answer, skip_special_tokens=True)


def test_bad_rows_cost_themselves_and_held_out_files_are_never_trained_on(tmp_path, model_directory):
    bad = [{"ask": None, "answer": "x"}, {"ask": "y", "answer": None}, {"ask": "z", "answer": ""}]
    bad.append({"ask": "long " * 200, "answer": "x"})
    pq.write_table(
        pa.Table.from_pylist([{"ask": "held out", "answer": "zz", "finish_reason": "stop"}] * 4),
        tmp_path / "eval.parquet",
    )
    evaluation = {"path": "eval.parquet", "max_examples": 3}
    reasons = ["stop"] * 16
    reasons[4] = "length"
    rows = [row | {"finish_reason": reason} for row, reason in zip([*ROWS[:12], *bad], reasons, strict=True)]
    path = write(tmp_path, model_directory, rows, evaluation=evaluation)
    three = "training.max_steps=3"
    summary = finetune(path, three, "training.warmup_steps=1")
    assert summary.errors == {"EMPTY_PROMPT": 1, "NULL_PROMPT": 2, "PROMPT_TOO_LONG": 1}
    assert (summary.status, summary.steps, summary.examples, summary.held_out) == ("done", 3, 12, 3)
    ready = prepare_finetune(path, [three, "training.warmup_steps=1"])
    data = training_data(ready)
    assert {text_of(example) for example in data.held_out} == {"zz"}
    assert "zz" not in {text_of(example) for example in data.examples}
    # An answer that was cut off at its length is not followed by an end; outputs of `segue run` say so.
    ends = [example.answer[-1] == ready.spec.answer_end_id for example in data.examples]
    assert [n for n, has_end in enumerate(ends) if not has_end] == [4]
    nothing = Holdout(frozenset({"rows.parquet", "eval.parquet"}), 0.0, 99, 0)
    with pytest.raises(NothingToTrain, match=r"no row to train on: 16 are held out, row errors: 1 EMPTY_PROMPT"):
        train_process(replace(ready.spec, holdout=nothing), Ranks())
    with pytest.raises(NothingToTrain, match=r"warmup_steps must be fewer than the 3 steps"):
        train_process(replace(ready.spec, training=ready.spec.training.model_copy(update={"warmup_steps": 3})), Ranks())


def test_share_held_out_depends_on_rows_alone(trained):
    folder, _ = trained
    ready = prepare_finetune(folder / "ft.yaml")
    manifest = load_manifest(ready.job.store)
    assert manifest is not None

    def held_out(units=manifest.units, **changes):
        rule = Holdout(**{"src_paths": None, "fraction": 0.2, "max_examples": 99, "seed": 0, **changes})
        data = load_training_data(ready.job.store, replace(manifest, units=units), rule, 257)
        assert len(data.examples) + len(data.held_out) == 30  # the others are trained on
        return {example.segments for example in data.held_out}

    assert held_out() == held_out(units=manifest.units[::-1])
    assert len(held_out(max_examples=2)) == 2
    assert held_out(max_examples=2) < held_out()
    assert held_out() < held_out(fraction=0.6)
    assert held_out() != held_out(seed=1)
    assert held_out(fraction=0.0) == set()
