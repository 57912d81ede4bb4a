"""A model whose layers lie on several devices. Stand-ins on a CPU: the weights of some lie on disk until their turn."""

from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch
from tiny_models import PROMPTS, tiny_model, tiny_tokenizer, tiny_tree_model
from transformers import AutoModelForCausalLM
from varlen_emulation import emulate

from segue.attention.memory.budget import KVShape
from segue.attention.memory.pool import KVPool
from segue.workers.devices import devices
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.models.load import load_model
from segue.workers.models.tree_model import tree_model
from segue.workers.rows.params import SamplingParams

SPLIT = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "disk",
    "lm_head": "disk",
}


@pytest.fixture(params=["cpu", "varlen"])
def each_backend(request, monkeypatch):
    if request.param == "varlen":
        emulate(monkeypatch)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("mask", ["segment", "causal"])
def test_split_model_gives_the_answers_of_the_whole(mask, tmp_path):
    dispatch: Any = accelerate.dispatch_model
    split = dispatch(tiny_model("llama"), SPLIT, main_device="cpu", offload_dir=tmp_path)
    assert next(split.model.layers[1].parameters()).device.type == "meta"  # so the hooks are at work
    model = tree_model(split, tiny_tokenizer())
    assert model.layer_devices == [torch.device("cpu")] * 3
    unfused = replace(tiny_tree_model(), fused=None)  # as a split model is, for the same rounding
    whole = Engine(unfused, EngineConfig(mask=mask))
    parts = Engine(model, EngineConfig(mask=mask))
    torch.testing.assert_close(parts.logits(PROMPTS), whole.logits(PROMPTS), atol=1e-6, rtol=0)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    answers = [[o.outputs[0].token_ids for o in engine.generate(PROMPTS, params)] for engine in (parts, whole)]
    assert answers[0] == answers[1]
    pairs = [("The sky is", " blue"), ("", "Once")]
    assert parts.loglikelihood(pairs) == whole.loglikelihood(pairs)


def test_model_is_loaded_onto_the_devices_of_a_map(tmp_path, monkeypatch):
    """Which is transformers' work, so it has to be told."""
    told = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: told.append(k["device_map"]) or load(*a, **k)
    )
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="float32", device="cpu", device_map={"": "cpu"})
    assert model.layer_devices == [torch.device("cpu")] * 3
    assert Engine(model).logits(PROMPTS).shape[0] == len(PROMPTS)
    assert told == [{"": "cpu"}]


def test_pool_lies_where_its_layers_compute():
    layers = [torch.device("cpu"), torch.device("meta"), torch.device("meta")]
    shape = KVShape(3, 2, 8, torch.float32)
    pool = KVPool(shape, 100 * shape.bytes_per_token, layers)
    assert [tensor.device.type for tensor in pool.tensors] == ["cpu", "meta", "meta"]


def test_memory_of_several_devices_is_what_the_fullest_allows(monkeypatch):
    """Each holds the keys of its own layers: three of four on the first, one on the second."""
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    free = {first: 3000, second: 500}
    monkeypatch.setattr(devices, "_free_on", lambda device, share: free[device])
    assert devices.kv_memory_bytes([first, first, first, second], None)[0] == min(3000 * 4 // 3, 500 * 4)
