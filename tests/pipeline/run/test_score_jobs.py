"""Scoring jobs: the numbers of the engine in process, the token counts of the plan, kills and resumes."""

import os
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml_job
from commands import last_line, segue
from echo_jobs import rows_of, segue_process, shards_in, wait_for
from in_process import run_here
from ready_jobs import ready_job
from tiny_models import tiny_tree_model

from segue.pipeline.ledger.columns import RESULT_COLUMNS
from segue.pipeline.ledger.manifest import ForeignOutput, load_manifest
from segue.pipeline.problems import JobRefused
from segue.pipeline.storage.open import open_store
from segue.workers.engine.engine import Engine, EngineConfig

pytestmark = pytest.mark.usefixtures("here")

SHOTS = "Q: one? A: 1.\nQ: two? A: 2.\n"
TOLERANCE = 1e-3


def write(folder, source, rows, task, text="{prompt}", **changes):
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=5)
    job = {
        "name": "scores",
        "task": task,
        "model": {"source": source},
        "mask": "causal",
        "input": {"path": "rows.parquet"},
        "prompt": {"format": "text", "text": text},
        "output": {"path": "out", "max_rows_per_file": 4},
        **changes,
    }
    return yaml_job.write(folder, job)


def run(path, *overrides):
    summary = run_here(path, *overrides)
    manifest = load_manifest(open_store(summary.output))
    assert manifest is not None
    return summary, manifest, [row for _, row in sorted(rows_of(Path(summary.output)).items())]


def engine(**config):
    return Engine(tiny_tree_model(), EngineConfig(mask="causal", **config))


def assert_computed_is_planned(summary, manifest):
    assert summary.num_errors == 0
    assert summary.tokens_computed == manifest.stats["tokens_distinct"]
    assert summary.tokens_requested == manifest.stats["tokens_requested"]


QUIZ = [
    {"prompt": f"Q: {number}?", "choices": [f"{number}", f"{number + 1}", "none", "x"][: 2 + number % 3], "label": 0}
    for number in range(14)
]
# Contexts that go on from another row's choice, an equal row, and one whose choices are equal.
NESTED = [
    {"prompt": "Q: 0? A: none Q: again?", "choices": ["0", "none"], "label": 1},
    {"prompt": "Q: 0?", "choices": ["0", "1"], "label": 0},
    {"prompt": "Q: 0?", "choices": ["same", "same"], "label": 1},
]


def test_choose_job_computes_the_plan_exactly_and_scores_as_in_process(tmp_path, model_directory):
    rows = QUIZ + NESTED
    changes = {
        "model": {"source": model_directory, "dtype": "float32"},
        "output": {"path": "out", "max_rows_per_file": 100},
    }
    path = write(tmp_path, model_directory, rows, "choose", f"{SHOTS}{{prompt}} A:", **changes)
    summary, manifest, found = run(path)
    assert_computed_is_planned(summary, manifest)
    assert summary.tokens_computed < summary.tokens_requested / 3
    assert manifest.stats["num_requests"] == sum(len(row["choices"]) for row in rows)
    for row, got in zip(rows, found, strict=True):
        context = f"{SHOTS}{row['prompt']} A:"
        scores = engine().loglikelihood([(context, f" {choice}") for choice in row["choices"]])
        logprobs = [score.logprob for score in scores]
        assert got["choice_logprobs"] == pytest.approx(logprobs, abs=TOLERANCE)
        assert got["choice_is_greedy"] == [score.is_greedy for score in scores]
        assert got["choice_num_tokens"] == [score.num_tokens for score in scores]
        normed = [logprob / len(choice) for logprob, choice in zip(logprobs, row["choices"], strict=True)]
        assert (got["choice"], got["choice_norm"]) == (_first_largest(logprobs), _first_largest(normed))
        assert got["correct"] == (got["choice"] == row["label"])
        assert got["correct_norm"] == (got["choice_norm"] == row["label"])
        assert got["choices"] == row["choices"]
    assert set(found[0]) == {*rows[0], *RESULT_COLUMNS["choose"]}


def _first_largest(values):
    return next(index for index, value in enumerate(values) if value > max(values) - 1e-6)


def test_loglikelihood_job_scores_each_row_after_its_own_context(tmp_path):
    """The echo engine expects tokens of the context, with log-probability -1, and gives any other -2."""
    rows = [{"prompt": prompt, "continuation": text} for prompt in ("abc", "xyz", "") for text in ("ab", "ax", "ab")]
    _, _, found = run(write(tmp_path, "echo", rows, "loglikelihood"))
    assert [row["logprob"] for row in found] == [-2, -3, -2, -4, -3, -4, -4, -4, -4]
    assert [row["is_greedy"] for row in found] == [True, False, True, *[False] * 6]
    assert {row["num_tokens"] for row in found} == {2}


def test_perplexity_job_of_long_and_equal_texts_computes_the_plan_exactly(tmp_path, model_directory):
    texts = [("once upon a time " * 20)[:length] for length in (3, 60, 64, 65, 200, 200, 330)]
    model = {"source": model_directory, "dtype": "float32"}
    path = write(
        tmp_path, model_directory, [{"prompt": text} for text in texts], "perplexity", model=model,
        limits={"max_model_len": 64}, output={"path": "out", "max_rows_per_file": 100},
    )  # fmt: skip
    summary, manifest, found = run(path)
    assert_computed_is_planned(summary, manifest)
    scores = engine(max_model_len=64).loglikelihood_rolling(texts)
    assert [row["logprob"] for row in found] == pytest.approx([score.logprob for score in scores], abs=1e-2)
    assert [row["num_tokens"] for row in found] == [len(text) for text in texts]
    assert [row["num_bytes"] for row in found] == [len(text) for text in texts]


def test_choose_job_under_the_segment_mask_differs_and_shares_whole_messages(tmp_path, model_directory):
    changes = {
        "model": {"source": model_directory, "dtype": "float32"},
        "prompt": {"format": "chat"},
        "mask": "segment",
    }
    rows = [{"prompt": "which?", "choices": ["a", "b"]}, {"prompt": "what?", "choices": ["a", "b"]}]
    summary, manifest, found = run(write(tmp_path, model_directory, rows, "choose", **changes))
    assert_computed_is_planned(summary, manifest)
    subject = Engine(tiny_tree_model(), EngineConfig(mask="segment"))
    chat = [{"role": "user", "content": "which?"}]
    scores = subject.loglikelihood([(chat, "a"), (chat, "b")])
    assert found[0]["choice_logprobs"] == pytest.approx([score.logprob for score in scores], abs=TOLERANCE)
    assert found[0]["correct"] is None  # no label


def test_scoring_rows_with_errors_are_in_the_same_schema(tmp_path):
    rows = [*QUIZ[:6], {"prompt": "Q", "choices": [], "label": 0}, {"prompt": "Q", "choices": ["x"], "label": 5}]
    summary, manifest, found = run(write(tmp_path, "echo", rows, "choose"))
    assert summary.errors == {"BAD_CHOICES": 1, "BAD_LABEL": 1}
    assert [row["error"] and row["error"]["code"] for row in found[-2:]] == ["BAD_CHOICES", "BAD_LABEL"]
    assert all(row["choice_logprobs"] is None for row in found[-2:])
    schemas = {pq.read_schema(path).remove_metadata() for path in shards_in(tmp_path / "out")}
    assert len(schemas) == 1
    assert manifest.stats["num_rows"] == len(rows)


def test_scoring_job_with_another_delimiter_in_the_same_folder_is_refused_by_name(tmp_path):
    path = write(tmp_path, "echo", QUIZ[:2], "choose")
    run(path)
    with pytest.raises(ForeignOutput, match="scoring: there"):
        run(path, "scoring.target_delimiter=''")


def evaluated(folder):
    """Exit code, and the groups that the command prints as JSON."""
    code, out, _ = segue("evaluate", folder)
    return code, last_line(out)["groups"] if code == 0 else []


@pytest.mark.long
def test_choose_job_killed_and_resumed_evaluates_to_the_same_numbers(tmp_path):
    rows = [QUIZ[number % len(QUIZ)] | {"task": "even" if number % 2 else "odd"} for number in range(48)]
    path = write(tmp_path, "echo:0.5", rows, "choose", workers={"units_in_flight": 1})
    with segue_process(tmp_path, "run", "job.yaml", "--quiet") as process:
        wait_for(lambda: len(shards_in(tmp_path / "out")) >= 3, process)
        os.kill(process.pid, signal.SIGKILL)
    assert 3 <= len(shards_in(tmp_path / "out")) < 12
    assert evaluated(tmp_path / "out")[0] == 2  # not complete
    run(path)
    run(path, "output.path=unkilled", "model.source=echo")
    code, groups = evaluated(tmp_path / "out")
    assert (code, groups) == evaluated(tmp_path / "unkilled")
    assert [(group["name"], group["n"]) for group in groups] == [("even", 24), ("odd", 24), ("all", 48)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "generate"}, "scoring.choices"),
        ({"task": "loglikelihood"}, "scoring.choices"),
        ({"sampling_params": {"max_tokens": 3}}, "sampling_params: got a value"),
        ({"task": "perplexity", "prompt": {"format": "chat"}, "scoring": {}}, "prompt.format: got 'chat', wanted text"),
        ({"scoring": {"label_column": "lable"}}, "scoring.label_column: got .* without column 'lable'.*'label'"),
        ({"scoring": {"choices_column": "label"}}, "scoring.choices_column: .* of type int64, wanted list<string>"),
        ({"scoring": {"label_column": "choices"}}, "scoring.label_column: .* wanted int"),
        ({"scoring": {"choices": ["{nothing}"]}}, "scoring: got .* without column 'nothing'"),
        ({"input": {"path": "rows.parquet", "columns": {"continuation": "prompt2"}}}, "input.columns.continuation"),
    ],
)
def test_scoring_job_with_a_mistake_is_refused_by_key(tmp_path, changes, message):
    sections = {"scoring": {"choices": ["a"]}} | changes
    with pytest.raises(JobRefused, match=message):
        ready_job(write(tmp_path, "echo", QUIZ[:2], sections.pop("task", "choose"), **sections))


def test_scoring_columns_may_have_other_names(tmp_path):
    rows = [{"prompt": "a", "options": ["x"], "gold": 0}]
    path = write(tmp_path, "echo", rows, "choose")
    columns = '{"choices": "options", "label": "gold"}'
    assert ready_job(path, f"input.columns={columns}").checked.columns.prompt == ("gold", "options", "prompt")
