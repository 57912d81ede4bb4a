"""The adapter of a training: runs and engines answer with it, and refuse what it was not trained with."""

import json
import stat

import pytest
from finetune_jobs import ROWS, SYSTEM, computed_here, training_data, write_run
from ready_jobs import ready_job
from tiny_models import tiny_model, tiny_tokenizer

from segue.pipeline.ledger.reading import error_counts, sample_rows
from segue.pipeline.problems import JobRefused
from segue.pipeline.run.worker import make_engine
from segue.pipeline.train.finetune import prepare_finetune
from segue.workers.engine.engine import Engine
from segue.workers.errors import ModelRefused
from segue.workers.rows.params import SamplingParams

# Ray's own code warns of itself; what it says of our calls stays an error.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")


def test_finetune_then_run_answers_with_the_adapter_under_its_mask(trained, model_directory, tmp_path):
    folder, summary = trained
    assert summary.status == "done"
    assert summary.steps == 30 * -(-summary.examples // 6)
    assert summary.examples + summary.held_out == 30
    assert summary.held_out > 0
    path = write_run(folder, model_directory, output={"path": str(tmp_path / "out")})
    job = ready_job(path)
    assert job.mask == "segment"  # mask: auto reads the adapter's record
    assert not job.warns_of_unadapted_mask
    assert set(computed_here(job)) == {"committed"}
    assert error_counts(str(tmp_path / "out")) == {}
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


def test_adapter_refuses_another_mask_or_template_by_name_unless_told(trained, model_directory):
    folder, _ = trained
    path = write_run(folder, model_directory, mask="causal")
    with pytest.raises(JobRefused, match=r"model.adapter: got mask causal \(trained with segment\)"):
        ready_job(path)
    told = ready_job(path, "model.check_adapter=false")
    engine = make_engine(told.worker_spec(1))  # what a worker does
    assert isinstance(engine, Engine)
    assert engine.config.mask == "causal"
    parts = write_run(folder, model_directory, prompt={"prompt_column": "ask", "segment_by": "part"})
    with pytest.raises(JobRefused, match=r"segment_by part \(trained with message\)"):
        ready_job(parts)
    template = "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    other = write_run(folder, model_directory, prompt={"prompt_column": "ask", "chat_template": template})
    with pytest.raises(JobRefused, match=r"chat_template \w+ \(trained with \w+\)"):
        ready_job(other)
    text = write_run(folder, model_directory, prompt={"format": "text", "text": "{ask}"})
    with pytest.raises(JobRefused, match=r"prompt_format text \(trained with chat\)"):
        ready_job(text)


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
        ready_job(path)
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
