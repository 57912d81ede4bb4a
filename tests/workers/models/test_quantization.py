"""Weights of fewer bits: transformers' own quantisation, passed through from a job, and checkpoints saved in it."""

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ready_jobs import ready_job
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from yaml_job import write

from segue.attention.segments import Segment
from segue.pipeline.problems import JobRefused
from segue.pipeline.run.worker import make_engine
from segue.workers.engine.engine import Engine
from segue.workers.errors import ModelRefused
from segue.workers.models.facts import FoundModel, ModelFacts, find_model, inspect_model
from segue.workers.models.fused_cpu import FusedDecoder
from segue.workers.models.inspect import config_facts
from segue.workers.rows.params import SamplingParams
from segue.workers.training.model import check_trainable
from segue.workers.training.params import LoraParams

PROMPTS = [[Segment(tuple(range(3, 30)), True), Segment(tuple(range(40, 40 + n)), True)] for n in (5, 9, 12)]


def torchao(name: str) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": name, "_version": 2, "_data": {}}}}


INT8 = torchao("Int8WeightOnlyConfig")


def inspect(directory: str, quantization: dict[str, Any] | None, dtype: str = "float32") -> ModelFacts:
    found = find_model(directory, adapter=None, revision=None)
    return inspect_model(found, config_facts, dtype=dtype, quantization=quantization)


def own_model(directory: Path) -> Any:
    """Loaded and quantised by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=AutoQuantizationConfig.from_dict(INT8)
    )


@torch.no_grad()
def own_logits(model: Any) -> torch.Tensor:
    """Causal, at each prompt's end."""
    ids = [torch.tensor([[t for segment in prompt for t in segment.token_ids]]) for prompt in PROMPTS]
    return torch.stack([model(each).logits[0, -1] for each in ids])


def test_answers_are_those_of_the_model_that_transformers_quantises(model_directory):
    engine = Engine.from_pretrained(model_directory, dtype="float32", mask="causal", quantization=INT8)
    assert type(engine.model.model.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    got = engine.logits(PROMPTS)
    torch.testing.assert_close(got, own_logits(own_model(model_directory)), atol=1e-5, rtol=0)
    plain = Engine.from_pretrained(model_directory, dtype="float32", mask="causal")
    error = (got - plain.logits(PROMPTS)).norm() / got.norm()
    assert 1e-4 < error < 0.05  # quantised, and not more than that


@pytest.mark.parametrize("mask", ["segment", "causal"])
@pytest.mark.parametrize("method", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_rows_do_not_depend_on_what_runs_beside_them(method, mask, model_directory):
    engine = Engine.from_pretrained(model_directory, dtype="float32", mask=mask, quantization=torchao(method))
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    together = [output.outputs[0].token_ids for output in engine.generate(PROMPTS, params)]
    alone = [engine.generate([prompt], params)[0].outputs[0].token_ids for prompt in PROMPTS]
    assert together == alone


def test_checkpoint_saved_with_fewer_bits_is_loaded_as_it_is(model_directory, tmp_path):
    model = own_model(model_directory)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_directory).save_pretrained(tmp_path)
    engine = Engine.from_pretrained(str(tmp_path), dtype="float32", mask="causal")
    torch.testing.assert_close(engine.logits(PROMPTS), own_logits(model), atol=1e-5, rtol=0)
    with pytest.raises(ModelRefused, match=r"quantised already .*torchao"):
        Engine.from_pretrained(str(tmp_path), quantization=INT8)
    with pytest.raises(ModelRefused, match="adapters are trained over plain"):
        check_trainable(str(tmp_path), None, LoraParams(), 2)


def test_quantised_decoder_is_not_fused(model_directory):
    assert FusedDecoder.of(own_model(model_directory)) is None


def test_size_in_memory_counts_a_byte_a_weight(model_directory):
    facts = {name: inspect(model_directory, quantization) for name, quantization in (("plain", None), ("int8", INT8))}
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    linear = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_proj.weight"))
    assert facts["plain"].num_weights == facts["int8"].num_weights
    assert facts["plain"].weight_bytes - facts["int8"].weight_bytes == 3 * linear


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"quant_method": "guess"}, "Unknown quantization type, got guess"),
        ({}, "quant_method"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int9", "_version": 2, "_data": {}}}}, "Int9"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq|GPTQ|[Oo]ptimum"),
    ],
)
def test_what_cannot_be_had_is_refused_before_weights_are_read(wanted, reason, model_directory):
    with pytest.raises(ModelRefused, match=f"model.quantization: .*({reason})"):
        inspect(model_directory, wanted, dtype="auto")


def test_a_method_that_wants_a_gpu_is_left_for_the_worker_to_try(monkeypatch, model_directory):
    def no_gpu(*args, **kwargs):
        raise RuntimeError("No GPU found. A GPU is needed for quantization.")

    monkeypatch.setattr(TorchAoHfQuantizer, "validate_environment", no_gpu)
    assert inspect(model_directory, INT8).num_weights > 0
    with pytest.raises(ModelRefused, match=r"model\.quantization: RuntimeError: No GPU found"):
        Engine.from_pretrained(model_directory, quantization=INT8)


def test_a_job_hands_it_to_its_workers_and_is_another_job_with_it(tmp_path, model_directory):
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "rows.parquet")
    shared = {
        "name": "q",
        "input": {"path": "rows.parquet"},
        "output": {"path": "out"},
        "prompt": {"format": "text", "text": "{prompt}"},
    }
    jobs = [
        ready_job(write(tmp_path, {"model": {"source": model_directory, "quantization": quantization}, **shared}))
        for quantization in (INT8, None)
    ]
    kinds: list[str] = []
    for job in jobs:
        engine = make_engine(job.worker_spec(threads=1))
        assert isinstance(engine, Engine)
        kinds.append(type(engine.model.model.model.layers[0].mlp.up_proj.weight).__name__)
    assert kinds == ["Int8Tensor", "Parameter"]
    assert {key for key, value in jobs[0].fields.items() if value != jobs[1].fields[key]} == {"model.quantization"}


def test_values_that_yaml_has_and_json_has_not_are_refused_by_key(tmp_path):
    path = write(
        tmp_path, {"name": "q", "model": {"source": "echo", "quantization": {"bits": datetime.date(2020, 1, 1)}}}
    )
    with pytest.raises(JobRefused, match=r"model\.quantization"):
        ready_job(path)


def test_adapter_over_quantised_weights_is_refused(model_directory):
    with pytest.raises(ModelRefused, match="merge it into the model first"):
        inspect_model(
            FoundModel(Path(model_directory), "its", adapter_identity="an adapter's"),
            config_facts,
            dtype="auto",
            quantization=INT8,
        )
    with pytest.raises(ModelRefused, match="merge it into the model first"):
        Engine.from_pretrained(model_directory, adapter="anywhere", quantization=INT8)
