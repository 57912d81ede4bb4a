"""Fine-tuning jobs: from Parquet to an adapter that serving answers with, through stops, kills and groups."""

import fcntl
import json
import shutil
import signal
import stat
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml_job
from echo_jobs import outcome, segue_process, wait_for
from ray.train import WorkerGroupError
from tiny_models import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from segue.jobs.cli import app
from segue.pipeline.ledger.manifest import ForeignOutput, load_manifest
from segue.pipeline.ledger.reading import sample_rows
from segue.pipeline.problems import JobRefused, WorkersFailed
from segue.pipeline.processes.interrupt import Interrupt
from segue.pipeline.ready.job import prepare
from segue.pipeline.run.run import run_job
from segue.pipeline.run.worker import make_engine
from segue.pipeline.storage.folder import LocalStore
from segue.pipeline.storage.store import OutputStorageError
from segue.pipeline.train import group as training_group
from segue.pipeline.train.examples import Holdout, load_training_data
from segue.pipeline.train.finetune import prepare_finetune, run_finetune
from segue.pipeline.train.metrics import METRICS, read_metrics
from segue.pipeline.train.process import NothingToTrain, train_process
from segue.workers.engine.engine import Engine
from segue.workers.errors import ModelRefused
from segue.workers.models.echo import echo_tokenizer
from segue.workers.rows.params import SamplingParams
from segue.workers.training.params import TrainingDiverged
from segue.workers.training.ranks import Ranks

# Ray's own code warns of itself; what it says of our calls stays an error.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]"),
    pytest.mark.usefixtures("local_ray"),
]

ROWS = [{"ask": f"word {number}?", "answer": "abcde"[number % 5] * (1 + number % 4)} for number in range(30)]
SYSTEM = "Say the letter."


def write(folder, source, rows=ROWS, **changes):
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=7)
    job = {
        "name": "letters",
        "model": {"source": source, "dtype": "float32"},
        "mask": "segment",
        "input": {"path": "rows.parquet"},
        "prompt": {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "{ask}"}]},
        "scoring": {"continuation_column": "answer"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "training": {
            "num_epochs": 30,
            "batch_size": 6,
            "learning_rate": 0.003,
            "warmup_steps": 10,
            "eval_steps": 20,
            "save_steps": 15,
        },
        "evaluation": {"fraction": 0.2},
        "output": {"path": "ft", "max_rows_per_file": 8},
        "workers": {"threads": 1},
        **changes,
    }
    return yaml_job.write(folder, job, "ft.yaml")


def write_run(folder, source, **changes):
    job = {
        "name": "answers",
        "model": {"source": source, "dtype": "float32", "adapter": "ft/adapter"},
        "input": {"path": "rows.parquet"},
        "prompt": {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "{ask}"}]},
        "sampling_params": {"max_tokens": 4},
        "output": {"path": "out"},
        **changes,
    }
    return yaml_job.write(folder, job, "run.yaml")


def finetune(path, *overrides):
    return run_finetune(prepare_finetune(path, overrides), lambda line: None, lambda line: None)


def curve(folder):
    """The metrics without their times."""
    lines = read_metrics(Path(folder) / METRICS)
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "seconds_left")} for line in lines]


def training_data(ready):
    manifest = load_manifest(ready.job.store)
    assert manifest is not None
    return load_training_data(ready.job.store, manifest, ready.spec.holdout, ready.spec.answer_end_id)


def text_of(example):
    """Its answer."""
    return echo_tokenizer().decode(example.answer, skip_special_tokens=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_directory):
    """A finished training, and what it said of itself."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, finetune(write(folder, model_directory))


def test_finetune_then_run_answers_with_the_adapter_under_its_mask(trained, model_directory, tmp_path):
    folder, summary = trained
    assert summary.status == "done"
    assert summary.steps == 30 * -(-summary.examples // 6)
    assert summary.examples + summary.held_out == 30
    assert summary.held_out > 0
    path = write_run(folder, model_directory, output={"path": str(tmp_path / "out")})
    job = prepare(path)
    assert job.mask == "segment"  # mask: auto reads the adapter's record
    assert not job.warns_of_unadapted_mask
    assert run_job(job, lambda line: None, quiet=True).num_errors == 0
    engine = Engine.from_pretrained(model_directory, mask="segment", dtype="float32", adapter=summary.adapter)
    for row in sample_rows(str(tmp_path / "out"), 30, 0):
        ask = ROWS[row["src_row"]]["ask"]
        prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ask}]
        (wanted,) = engine.generate([prompt], SamplingParams(max_tokens=4))
        assert row["generated_text"] == wanted.outputs[0].text


def test_loss_of_the_training_is_what_serving_computes(trained, model_directory):
    folder, summary = trained
    data = training_data(prepare_finetune(folder / "ft.yaml"))
    engine = Engine.from_pretrained(model_directory, mask="segment", dtype="float32", adapter=summary.adapter)
    scores = engine.loglikelihood([(example.segments, example.answer) for example in data.held_out])
    loss = -sum(score.logprob for score in scores) / sum(score.num_tokens for score in scores)
    assert loss == pytest.approx(summary.eval_loss, abs=1e-4)
    assert all(example.answer[-1] == engine.model.tokenizer.eos_token_id for example in data.held_out)


def test_finished_training_is_not_repeated_and_other_parameters_are_refused_by_name(trained):
    folder, summary = trained
    again = finetune(folder / "ft.yaml")
    assert again.status == "already_complete"
    assert (again.eval_loss, again.steps) == (summary.eval_loss, summary.steps)
    with pytest.raises(ForeignOutput, match=r"lora: there .*\"r\": 4.*here .*\"r\": 5"):
        finetune(folder / "ft.yaml", "lora.r=5")


def test_adapter_refuses_another_mask_or_template_by_name_unless_told(trained, model_directory):
    folder, _ = trained
    path = write_run(folder, model_directory, mask="causal")
    with pytest.raises(JobRefused, match=r"model.adapter: got mask causal \(trained with segment\)"):
        prepare(path)
    told = prepare(path, ["model.check_adapter=false"])
    engine = make_engine(told.worker_spec(1))  # what a worker does
    assert isinstance(engine, Engine)
    assert engine.config.mask == "causal"
    parts = write_run(folder, model_directory, prompt={"prompt_column": "ask", "segment_by": "part"})
    with pytest.raises(JobRefused, match=r"segment_by part \(trained with message\)"):
        prepare(parts)
    template = "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    other = write_run(folder, model_directory, prompt={"prompt_column": "ask", "chat_template": template})
    with pytest.raises(JobRefused, match=r"chat_template \w+ \(trained with \w+\)"):
        prepare(other)
    text = write_run(folder, model_directory, prompt={"format": "text", "text": "{ask}"})
    with pytest.raises(JobRefused, match=r"prompt_format text \(trained with chat\)"):
        prepare(text)


def test_engine_refuses_another_mask_than_the_adapters_unless_told(trained, model_directory):
    _, summary = trained
    with pytest.raises(ModelRefused, match=r"mask causal \(trained with segment\)"):
        Engine.from_pretrained(model_directory, mask="causal", dtype="float32", adapter=summary.adapter)
    assert Engine.from_pretrained(model_directory, dtype="float32", adapter=summary.adapter).config.mask == "segment"
    other = Engine.from_pretrained(
        model_directory, mask="causal", dtype="float32", adapter=summary.adapter, check_adapter=False
    )
    assert other.config.mask == "causal"
    assert other.generate([[{"role": "user", "content": "x"}]], SamplingParams(max_tokens=1))


def test_engine_refuses_chats_with_another_template_than_the_adapters(trained, model_directory):
    _, summary = trained
    engine = Engine.from_pretrained(model_directory, dtype="float32", adapter=summary.adapter)
    engine.model.tokenizer.chat_template += "{# another one #}"
    with pytest.raises(ModelRefused, match=r"chat_template \w+ \(trained with \w+\)"):
        engine.generate([[{"role": "user", "content": "x"}]])


def test_adapter_refuses_another_base_model_of_the_same_shape(trained, tmp_path):
    folder, _ = trained
    other = tmp_path / "other"
    tiny_model("llama", seed=9).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    path = write_run(folder, str(other))
    with pytest.raises(JobRefused, match=r"base_identity \w+ \(trained with \w+\)"):
        prepare(path)
    record = json.loads((folder / "ft" / "adapter" / "segue.json").read_text())
    assert record["base_model"] == "model0"  # without the folder that it was in
    assert json.loads((folder / "ft" / "adapter" / "adapter_config.json").read_text())["target_modules"] == [
        "down_proj",
        "q_proj",
        "v_proj",
    ]


def test_adapter_may_be_read_by_whoever_may_read_the_record(trained):
    folder, _ = trained
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder / "ft" / "adapter").iterdir()}
    assert set(modes.values()) == {modes["segue.json"]}


def test_every_problem_of_a_job_is_told_at_once(tmp_path, monkeypatch):
    rows = {"path": "rows.parquet", "limit": 5, "sample": 0.5, "filters": [["question", "!=", None]]}
    path = write(tmp_path, "echo", evaluation={"path": "rows.parquet"}, input=rows, workers={"max_num_seqs": 3})
    with pytest.raises(JobRefused) as refused:
        prepare_finetune(path, ["model.adapter=nowhere"])
    text = str(refused.value)
    assert "model.source: got 'echo', wanted a model with weights" in text
    for name in ("limit", "sample", "filters"):
        assert f"input.{name}: got a value, wanted it left out" in text
    assert "model.adapter: got an adapter" in text
    assert "workers.max_num_seqs: got a value, wanted it left out" in text
    with pytest.raises(JobRefused, match=r"workers.num_gpus: got 1, wanted auto or 0: a training in several processes"):
        prepare_finetune(path, ["workers.num_gpus=1", "workers.max_size=2"])
    with pytest.raises(JobRefused, match=r"lora.rank: got an unknown key"):
        prepare_finetune(path, ["lora.rank=3"])
    with pytest.raises(JobRefused, match=r"training.learning_rate: .*greater than 0"):
        prepare_finetune(path, ["training.learning_rate=0"])
    with pytest.raises(JobRefused, match=r"evaluation.path: got .*nowhere.parquet"):
        prepare_finetune(path, ["evaluation.path=nowhere.parquet"])
    with pytest.raises(JobRefused, match=r"'replies'"):
        prepare_finetune(path, ["scoring.continuation_column=replies"])
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(JobRefused, match=r"output.path: got 's3://bucket/ft', wanted a local folder"):
        prepare_finetune(path, ["output.path=s3://bucket/ft"])


def test_validate_checks_a_training_without_starting_it(trained, tmp_path, model_directory):
    path = write(tmp_path, model_directory)
    result = CliRunner().invoke(app, ["validate", str(path)])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "valid": True,
        "rows": 30,
        "mask": "segment",
        "dtype": "float32",
        "planned": False,
        "sample": {"rows": 0, "errors": 0},
    }
    assert not (tmp_path / "ft").exists()
    wrong = CliRunner().invoke(app, ["validate", str(path), "--set", "lora.target_modules=[nothing]"])
    assert wrong.exit_code == 2
    assert "no linear layer 'nothing'" in wrong.stderr


def test_training_is_no_task_of_run(tmp_path, model_directory):
    path = write_run(tmp_path, model_directory, task="finetune", model={"source": model_directory})
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    result = CliRunner().invoke(app, ["run", str(path)])
    assert result.exit_code == 2
    assert "task: got 'finetune'" in result.stderr


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


def planned_again(trained, target):
    """The training's files and plan in another folder, as if it had just been planned there."""
    folder, _ = trained
    for name in ("rows.parquet", "ft.yaml"):
        shutil.copy2(folder / name, target / name)  # the same times: they are part of a file's identity
    shutil.copytree(folder / "ft" / "_job", target / "ft" / "_job")
    return target / "ft.yaml"


@pytest.mark.chaos
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_killed_training_resumes_and_ends_with_the_same_curve(trained, tmp_path, signum):
    folder, whole = trained
    path = planned_again(trained, tmp_path)
    checkpoints = tmp_path / "ft" / "checkpoints"
    with segue_process(tmp_path, "finetune", "ft.yaml") as process:
        wait_for(lambda: list(checkpoints.glob("step-*")), process)
        process.send_signal(signum)
        code, stdout, stderr = outcome(process)
    assert code == (143 if signum == signal.SIGTERM else -9), stderr
    if signum == signal.SIGTERM:
        assert json.loads(stdout.splitlines()[-1])["status"] == "interrupted"
    done = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))
    assert 0 < done < whole.steps
    resumed = finetune(path)
    assert (resumed.status, resumed.steps, resumed.eval_loss) == ("done", whole.steps, whole.eval_loss)
    assert curve(tmp_path / "ft") == curve(folder / "ft")
    adapters = [place / "ft" / "adapter" / "adapter_model.safetensors" for place in (tmp_path, folder)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.chaos
def test_two_processes_train_like_one(trained, tmp_path):
    folder, alone = trained
    both = finetune(planned_again(trained, tmp_path), "workers.max_size=2")
    assert (both.status, both.steps) == ("done", alone.steps)
    for name in ("loss", "grad_norm"):
        seen = [[line[name] for line in curve(place / "ft") if name in line] for place in (folder, tmp_path)]
        assert seen[0] == pytest.approx(seen[1], abs=1e-3, rel=1e-2)
    assert both.eval_loss == pytest.approx(alone.eval_loss, abs=1e-3)


def test_failure_in_a_group_is_told_as_itself():
    """As Ray Train hands it over."""
    error = WorkerGroupError("1 of 2 failed", {1: TrainingDiverged("step 2: loss nan")})
    assert isinstance(training_group.cause_of_group(error), TrainingDiverged)
    other = training_group.cause_of_group(WorkerGroupError("1 of 2 failed", {0: KeyError("x")}))
    assert isinstance(other, WorkersFailed)
    assert "1 of 2 failed" in str(other)


def test_group_larger_than_the_cluster_is_refused_instead_of_waiting(trained, tmp_path):
    ready = prepare_finetune(planned_again(trained, tmp_path))
    with pytest.raises(WorkersFailed, match="max_size 3 with 1 threads each wants 3 CPUs, the cluster has 2"):
        training_group.train_group(ready.spec, 3, 1, str(tmp_path), Interrupt())


def test_training_that_is_refused_does_not_bind_its_folder(trained, tmp_path):
    _, whole = trained
    path = planned_again(trained, tmp_path)
    with pytest.raises(JobRefused, match="warmup_steps must be fewer"):
        finetune(path, "training.warmup_steps=100000")
    with pytest.raises(JobRefused, match="no linear layer 'nothing'"):
        finetune(path, "lora.target_modules=[nothing]")
    assert finetune(path, "training.max_num_batched_tokens=1000").steps == whole.steps


def test_second_training_in_a_folder_is_refused_while_the_first_is_at_work(trained, tmp_path):
    path = planned_again(trained, tmp_path)
    with (tmp_path / "ft" / "_job" / "training.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ForeignOutput, match="another training is at work"):
            finetune(path)


def test_adapter_that_is_gone_is_missed(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "all", copy_function=shutil.copy2)
    shutil.rmtree(tmp_path / "all" / "ft" / "adapter")
    with pytest.raises(OutputStorageError, match=r"adapter is gone although .*_SUCCESS"):
        finetune(tmp_path / "all" / "ft.yaml")


def test_finetune_command_ends_in_json_and_a_picture(trained):
    folder, _ = trained
    result = CliRunner().invoke(app, ["finetune", str(folder / "ft.yaml"), "--quiet"])
    assert result.exit_code == 0
    last = json.loads(result.stdout.splitlines()[-1])
    assert last["status"] == "already_complete"
    assert Path(last["loss_curve"]).read_bytes().startswith(b"\x89PNG")
    assert Path(last["adapter"]).joinpath("segue.json").is_file()
    config = json.loads(Path(last["adapter"]).joinpath("adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    refused = CliRunner().invoke(app, ["evaluate", str(folder / "ft")])
    assert refused.exit_code == 2
    assert "finetune" in refused.stderr
    assert LocalStore(folder / "ft").exists("_SUCCESS")
