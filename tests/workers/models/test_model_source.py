"""Where models come from, and what is refused before weights are read."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from tiny_models import oracle_logits, tiny_model, tiny_tokenizer

from segue.attention.segments import Segment
from segue.workers.devices.devices import resolve_dtype
from segue.workers.engine.engine import Engine, EngineConfig
from segue.workers.errors import ModelRefused
from segue.workers.models.facts import find_model, inspect_model
from segue.workers.models.inspect import config_facts
from segue.workers.models.load import load_model
from segue.workers.models.source import file_digest, locate, safetensors_directory, weights_identity

PROMPT = [Segment((5, 6, 7), True), Segment((8, 9), False)]


@pytest.fixture
def model_directory(tmp_path):
    path = tmp_path / "model"
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGUE_CACHE", str(tmp_path / "cache"))


def inspect(path, **changes):
    return inspect_model(
        find_model(str(path), **{"adapter": None, "revision": None, **changes}), config_facts, dtype="float32"
    )


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_model_directory_loads_and_equals_transformers(model_directory):
    engine = Engine.from_pretrained(str(model_directory), mask="segment", dtype="float32")
    wanted = oracle_logits(tiny_model("llama"), PROMPT)[-1]
    torch.testing.assert_close(engine.logits([PROMPT])[0], wanted, atol=1e-4, rtol=0)


def test_weights_of_many_gigabytes_are_looked_at_in_little_memory(tmp_path):
    """As the checking child has it, whose limit counts what is mapped to be written."""
    shape = (70_000, 32_000)
    header = json.dumps({"embed_tokens.weight": {"dtype": "BF16", "shape": shape, "data_offsets": (0, 4_480_000_000)}})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 4_480_000_000)  # a hole
    code = f"""
import resource
from pathlib import Path
from types import SimpleNamespace
from segue.workers.models import support
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
config = SimpleNamespace(vocab_size=70_000, hidden_size=32_000)
config.get_text_config = lambda: config
support.check_weights_match(Path({str(tmp_path)!r}), config)
print(support.num_weights(Path({str(tmp_path)!r})))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, str(70_000 * 32_000)), found.stderr


def test_adapter_is_merged_and_equals_peft(model_directory, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny_model("llama")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    engine = Engine.from_pretrained(
        str(model_directory), mask="segment", dtype="float32", adapter=str(tmp_path / "adapter")
    )
    wanted = oracle_logits(adapted.merge_and_unload(), PROMPT)[-1]
    torch.testing.assert_close(engine.logits([PROMPT])[0], wanted, atol=1e-4, rtol=0)
    plain = Engine.from_pretrained(str(model_directory), mask="segment", dtype="float32").logits([PROMPT])[0]
    assert (plain - wanted).abs().max() > 1e-2


def test_adapter_record_decides_the_mask(model_directory, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_config.json").write_text("{}")
    assert inspect(model_directory, adapter=str(adapter)).adapter_mask is None
    (adapter / "segue.json").write_text('{"mask": "segment"}')
    assert inspect(model_directory, adapter=str(adapter)).adapter_mask == "segment"
    (adapter / "segue.json").write_text('{"mask": "both"}')
    with pytest.raises(ModelRefused, match=r"mask: .*'segment' or 'causal', got 'both'"):
        inspect(model_directory, adapter=str(adapter))


def test_identity_changes_with_weights_config_and_tokenizer(model_directory):
    seen = {weights_identity(locate(str(model_directory)))}
    edit_config(model_directory, rms_norm_eps=1e-3)
    seen.add(weights_identity(locate(str(model_directory))))
    tiny_model("llama", seed=1).save_pretrained(model_directory)
    seen.add(weights_identity(locate(str(model_directory))))
    (model_directory / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(weights_identity(locate(str(model_directory))))
    assert len(seen) == 4


def test_file_digest_is_remembered_and_notices_a_change(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = file_digest(path)
    assert file_digest(path) == first
    path.write_bytes(b"other")
    assert file_digest(path) != first


def test_cache_on_a_full_disk_forgets_digests_and_refuses_conversions_by_name(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    cache = tmp_path / "cache"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("segue.workers.models.source.os.replace", full)
    assert file_digest(path) == hashlib.sha256(b"one").hexdigest()
    assert not list((cache / "digests").iterdir())
    monkeypatch.setattr("segue.workers.models.source._write_safetensors", full)
    with pytest.raises(ModelRefused, match=r"model\.gguf cannot be converted into .*SEGUE_CACHE.*No space left"):
        safetensors_directory(locate(str(path)))
    assert not list((cache / "models").iterdir())


def test_tokenizer_with_more_ids_than_the_weights_is_refused(model_directory):
    tiny_model("llama", vocab_size=200).save_pretrained(model_directory)
    with pytest.raises(ModelRefused, match=r"do not match: the tokenizer has ids up to 258, the weights 200 rows"):
        inspect(model_directory)


def test_config_that_contradicts_the_weights_is_refused(model_directory):
    edit_config(model_directory, hidden_size=96)
    with pytest.raises(ModelRefused, match=r"config.json and weights do not match: .*\[320, 48\], wanted \[320, 96\]"):
        inspect(model_directory)


def test_truncated_weights_are_refused(model_directory):
    weights = model_directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelRefused, match="not a readable safetensors file"):
        inspect(model_directory)


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code", "_attn_implementation_internal"])
def test_config_that_asks_for_remote_code_is_refused(model_directory, key):
    edit_config(model_directory, **{key: {"AutoModel": "evil.Model"}})
    with pytest.raises(ModelRefused, match=key):
        inspect(model_directory)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"model_type": "llama", ', "is no JSON"),
        ("\xff", "is no JSON"),
        ("[1]", "is a list, wanted an object"),
        ('{"model_type": "llama", "hidden_size": "many"}', "cannot be used: .*hidden_size"),
    ],
)
def test_config_that_is_none_is_refused_with_the_reason(model_directory, text, told):
    (model_directory / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelRefused, match=rf"config\.json {told}"):
        inspect(model_directory)


def test_unknown_model_type_is_refused_by_name(model_directory):
    edit_config(model_directory, model_type="perpetuum")
    with pytest.raises(ModelRefused, match="'perpetuum' is unknown"):
        inspect(model_directory)


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelRefused, match=r"only pytorch_model.bin \(pickles can run code\)"):
        locate(str(tmp_path))


def test_model_without_tokenizer_is_refused(model_directory):
    for path in model_directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelRefused, match="tokenizer"):
        inspect(model_directory)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("no/such/path/at/all", "neither an existing path"),
        ("package://not_installed_anywhere/x.gguf", "package 'not_installed_anywhere' is not installed"),
        ("package://json/no_such_file.gguf", "has no file"),
        ("package://json/../secrets", "has no file"),
        ("package://json;import os/x", "not installed"),
    ],
)
def test_source_that_is_not_there_is_refused_with_the_reason(source, reason):
    with pytest.raises(ModelRefused, match=reason):
        locate(source)


def test_gguf_conversion_is_done_once_and_keeps_the_file_identity(tmp_path, monkeypatch):
    """A conversion that is there is used: the file's digest names it."""
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF")
    files = locate(str(gguf))
    calls = []

    def convert(files, target):
        calls.append(target)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr("segue.workers.models.source._write_safetensors", convert)
    first = safetensors_directory(files)
    assert safetensors_directory(files) == first
    assert len(calls) == 1
    assert (first / "config.json").is_file()


def test_gguf_conversion_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF")

    def convert(files, target):
        (target / "model.safetensors").write_bytes(b"half")
        raise MemoryError

    monkeypatch.setattr("segue.workers.models.source._write_safetensors", convert)
    with pytest.raises(MemoryError):
        safetensors_directory(locate(str(gguf)))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_dtype_auto_on_a_cpu_is_bf16_only_where_the_processor_multiplies_it(has_bf16, dtype, monkeypatch):
    monkeypatch.setattr("segue.workers.devices.devices.cpu_multiplies_bf16", lambda: has_bf16)
    assert resolve_dtype("auto", torch.device("cpu")) == dtype


def test_dtype_float16_on_a_cpu_is_refused():
    with pytest.raises(ModelRefused, match="bfloat16 or float32"):
        resolve_dtype("float16", torch.device("cpu"))


def test_bfloat16_answers_are_close_to_fp32(model_directory):
    fp32 = Engine(load_model(str(model_directory), dtype="float32"), EngineConfig(mask="segment")).logits([PROMPT])[0]
    bf16 = Engine(load_model(str(model_directory), dtype="bfloat16"), EngineConfig(mask="segment")).logits([PROMPT])[0]
    assert float((bf16 - fp32).norm() / fp32.norm()) < 0.05


def test_hub_id_is_resolved_to_the_commit_of_its_branch(model_directory, tmp_path, monkeypatch):
    """From the hub's cache on this machine, as workers that are offline find it."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    model_directory.rename(repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    facts = inspect("someone/tiny")
    assert facts.commit == commit
    assert inspect("someone/tiny", revision=facts.commit).identity == facts.identity


def test_hub_id_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelRefused, match="'someone/tiny' cannot be had from the hub"):
        inspect("someone/tiny")
