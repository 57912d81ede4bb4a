"""Cases C23 to C29 of the bad-input matrix: the model and the prompt."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad.cases import Case, Cases, job

MODELS = Cases()
BAD_TEMPLATES = {
    "that raises": "{{ raise_exception('no') }}",
    "that drops the message": "{% for m in messages %}{{ m['role'] }}{% endfor %}",
    "that repeats the message": "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}",
    "that is a bomb while it is compiled": "{{ 'a' * 9000000000 }}{% for m in messages %}{{ m.content }}{% endfor %}",
}


def model_case(number: str, what: str, wanted: str, **sections: Any) -> Callable[[Callable[[Path], None]], None]:
    """The decorated function spoils a copy of a tiny model."""

    def add(spoil: Callable[[Path], None]) -> None:
        def make(folder: Path) -> Path:
            shutil.copytree(os.environ["SEGUE_TINY_MODEL"], folder / "model")
            spoil(folder / "model")
            return job(folder, model={"source": "model", "dtype": "float32"}, **sections)

        MODELS.append(Case(number, what, make, wanted))

    return add


def edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


MODELS.cases(
    "C23",
    "a model that is not there",
    r"model: .*neither an existing path",
    [{"model": {"source": "no/such/model/at/all"}}],
)


@model_case("C23", "a config of another size than the weights", r"model: .*do not match")
def other_size(model: Path) -> None:
    edit(model, hidden_size=96)


@model_case("C23", "a config of another vocabulary than the weights", r"model: .*do not match")
def other_vocabulary(model: Path) -> None:
    edit(model, vocab_size=100)


@model_case("C23", "a model without tokenizer", r"model: .*tokenizer")
def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):

    @model_case("C24", f"weights in {name}", r"model: .*(pickle|safetensors)")
    def pickled(model: Path, name: str = name) -> None:
        (model / "model.safetensors").rename(model / name)


def header(model: Path, change: Callable[[dict[str, Any]], None], size: int | None = None) -> None:
    """Rewrite a safetensors file with another header."""
    path = model / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + content[8 + length :])


@model_case("C25", "safetensors whose header is said to be 1 EiB", r"model: .*safetensors")
def huge_header(model: Path) -> None:
    header(model, lambda entries: None, size=2**60)


@model_case("C25", "safetensors whose tensors overlap", r"model: .*safetensors")
def overlapping(model: Path) -> None:
    def change(entries: dict[str, Any]) -> None:
        names = [name for name in entries if name != "__metadata__"]
        entries[names[0]]["data_offsets"] = entries[names[1]]["data_offsets"]
        entries[names[0]]["shape"] = entries[names[1]]["shape"]

    header(model, change)


@model_case("C25", "safetensors that are cut off", r"model: .*safetensors")
def short_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


for key in ("auto_map", "trust_remote_code", "_attn_implementation_internal"):

    @model_case("C26", f"a config with {key}", rf"model: .*{key}")
    def code_in_config(model: Path, key: str = key) -> None:
        edit(model, **{key: {"AutoModelForCausalLM": "evil.Model"}})


@model_case("C27", "a chat without a chat template", r"prompt: .*needs a chat template")
def no_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))


for what, source in BAD_TEMPLATES.items():

    @model_case("C27", f"a chat template {what}", r"prompt: .*chat template")
    def bad_template(model: Path, source: str = source) -> None:
        (model / "chat_template.jinja").write_text(source)


MODELS.cases(
    "C28",
    "a placeholder without a column",
    r"'documnet'.*",
    [{"prompt": {"messages": [{"role": "user", "content": "{documnet}"}]}}],
)
MODELS.cases(
    "C28",
    "a placeholder that is an expression",
    r"prompt: (placeholder|lone)",
    [
        {"prompt": {"format": "text", "text": each}}
        for each in ("{prompt.__class__}", "{prompt[0]}", "{prompt!r:>99999}", "{}", "{a{b}}")
    ],
)
MODELS.cases("C29", "GPUs that are not there", r"workers\.num_gpus", [{"workers": {"num_gpus": 8}}])
