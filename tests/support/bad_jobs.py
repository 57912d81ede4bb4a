"""Jobs and datasets that must be refused before any work, by the numbers of the bad-input matrix (C1 to C33).

    python tests/support/bad_inputs.py     prints what was expected of each and what came

Each case makes one wrong thing in a folder that otherwise holds a good job.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bad_parquet import GOOD

OK = ""  # what a case that must pass expects
BAD_TEMPLATES = {
    "that raises": "{{ raise_exception('no') }}",
    "that drops the message": "{% for m in messages %}{{ m['role'] }}{% endfor %}",
    "that repeats the message": "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}",
    "that is a bomb while it is compiled": "{{ 'a' * 9000000000 }}{% for m in messages %}{{ m.content }}{% endfor %}",
}


@dataclass(frozen=True)
class Case:
    """One wrong thing: `make` puts it into a folder with a good dataset and returns the job file."""

    number: str
    what: str
    make: Callable[[Path], Path]
    wanted: str  # a regular expression of the refusal, or OK


CASES: list[Case] = []


def case(number: str, what: str, wanted: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    """The decorated function is a case."""

    def add(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        CASES.append(Case(number, what, make, wanted))
        return make

    return add


def cases(number: str, what: str, wanted: str, sections: list[dict[str, Any]]) -> None:
    """Several job files that are wrong in one way."""
    for changes in sections:
        shown = json.dumps(changes, ensure_ascii=True)[:60]
        CASES.append(Case(number, f"{what}: {shown}", lambda folder, changes=changes: job(folder, **changes), wanted))


def write(path: Path, columns: dict[str, Any] | pa.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


def good(folder: Path) -> None:
    """What each case begins with."""
    write(folder / "in" / "a.parquet", {"prompt": ["one", "two", "three"], "id": [1, 2, 3]})


def job(folder: Path, **sections: Any) -> Path:
    values = {"name": "job", "model": {"source": "echo"}, "input": {"path": "in"}, "output": {"path": "out"}} | sections
    return text_job(folder, json.dumps(values))


def text_job(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


GOOD_TEXT = "name: job\nmodel: {source: echo}\ninput: {path: in}\noutput: {path: out}\n"


def planned(folder: Path, **sections: Any) -> Path:
    """The job file of a good job, after another was planned into its output."""
    from in_process import ready_job, without_children

    from segue.pipeline.plan.windows import plan_next

    with without_children():
        plan_next(ready_job(job(folder, **sections)), None)
    return job(folder)


# C1 to C7: the job file

cases("C1", "unknown key", r"did you mean 'sampling_params'", [{"samplng_params": {}}])
cases("C1", "unknown key in a section", r"did you mean 'max_tokens'", [{"sampling_params": {"max_token": 5}}])


@case("C2", "a key twice", r"job\.yaml:6: seed: got the key a second time")
def key_twice(folder: Path) -> Path:
    return text_job(folder, GOOD_TEXT + "seed: 1\nseed: 2\n")


@case("C3", "a YAML tag that makes Python objects", r"tag")
def python_tag(folder: Path) -> Path:
    return text_job(folder, GOOD_TEXT + "seed: !!python/object/apply:os.getpid []\n")


@case("C4", "an alias bomb", r"alias|anchor")
def alias_bomb(folder: Path) -> Path:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)
    ]
    return text_job(folder, GOOD_TEXT + "\n".join(lines))


@case("C4", "a job file of 2 MB", r"1,048,576|1 MiB|too large|bytes")
def huge_file(folder: Path) -> Path:
    return text_job(folder, GOOD_TEXT + "#" * 2**21)


for value in ("1_0", "12:30", "1.10"):

    @case("C5", f"name: {value}", r"name: ")
    def surprise(folder: Path, value: str = value) -> Path:
        return text_job(folder, GOOD_TEXT.replace("name: job", f"name: {value}"))


@case("C5", "name: no, which is a word here", OK)
def word(folder: Path) -> Path:
    return text_job(folder, GOOD_TEXT.replace("name: job", "name: no"))


cases(
    "C6",
    "a number out of range",
    r"sampling_params\.|limits\.|workers\.",
    [
        {"sampling_params": {"temperature": -1}},
        {"sampling_params": {"top_p": 0}},
        {"sampling_params": {"top_p": 1.5}},
        {"sampling_params": {"max_tokens": 0}},
        {"sampling_params": {"n": 0}},
        {"limits": {"max_model_len": 10**9}},
        {"limits": {"row_cpu_s": 0}},
        {"limits": {"row_memory_bytes": 1000}},
        {"workers": {"max_size": -1}},
        {"workers": {"max_num_seqs": 0}},
    ],
)


@case("C6", "temperature: .nan", r"sampling_params\.temperature")
def nan_temperature(folder: Path) -> Path:
    return text_job(folder, GOOD_TEXT + "sampling_params: {temperature: .nan}\n")


cases("C7", "options that contradict each other", r"max_size", [{"workers": {"min_size": 3, "max_size": 2}}])
cases(
    "C7",
    "options of another task",
    r"means nothing to task",
    [{"task": "perplexity", "prompt": {"format": "text", "text": "{prompt}"}, "sampling_params": {"n": 2}}],
)

# C8 to C18, C30 to C33: the dataset and the output

cases("C8", "input that is not there", r"input\.path: .*does not exist", [{"input": {"path": "nowhere"}}])
cases("C8", "a glob that matches nothing", r"input\.path: .*no input file", [{"input": {"path": "in/*.csv"}}])


@case("C8", "a folder without Parquet files", r"input\.path: .*no input file")
def folder_without_files(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return job(folder, input={"path": "empty"})


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "in" / "b.parquet"
        path.write_bytes(change((folder / "in" / "a.parquet").read_bytes()))
        return job(folder)

    return make


for what, change in {
    "of no bytes": lambda content: b"",
    "that is text": lambda content: b"prompt\nhello, this is a text and no Parquet\n",
    "that is cut off": lambda content: content[: len(content) // 2],
    "whose footer is said to be 2 GiB": lambda content: content[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1",
    "whose footer is encrypted": lambda content: content[:-4] + b"PARE",
    "whose footer is noise": lambda content: content[:-100] + bytes(reversed(content[-100:-8])) + content[-8:],
}.items():
    case("C9", f"a file {what}", r"input\.path: .*b\.parquet.*wanted a readable Parquet file")(damaged(change))


for num_rows, all_rows in ((4, 100), (4, 2), (-5, -5)):

    @case(
        "C9",
        f"a file of {num_rows} rows whose footer says {all_rows}",
        r"input\.path: .*b\.parquet' with .* in its row groups",
    )
    def disagreeing(folder: Path, num_rows: int = num_rows, all_rows: int = all_rows) -> Path:
        file = replace(GOOD, num_rows=num_rows, all_rows=all_rows)
        (folder / "in" / "b.parquet").write_bytes(file.content())
        return job(folder, output={"path": "out", "columns": []})


def second_file(columns: dict[str, Any] | pa.Table, **sections: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder / "in" / "b.parquet", columns)
        return job(folder, **sections)

    return make


case("C10", "a file without the prompt's column", r"b\.parquet without column 'prompt'")(
    second_file({"text": ["x"], "id": [4]})
)
case("C11", "a column in other case", r"did you mean 'Prompt'")(second_file({"Prompt": ["x"], "id": [4]}))
case("C11", "a column twice", r"2 columns 'prompt'")(
    second_file(pa.table([["x"], ["y"], [4]], names=["prompt", "prompt", "id"]))
)
case("C12", "a prompt that is a number", r"prompt.*int64")(second_file({"prompt": [1], "id": [4]}))
case("C12", "messages of another shape", r"messages.*list<")(
    second_file({"messages": [["x"]], "prompt": ["x"], "id": [4]}, input={"path": "in/b.parquet"})
)
case("C13", "a column of two types", r"'id'.*(double|int64)")(second_file({"prompt": ["x"], "id": [4.5]}))
case("C13", "a column of nulls in one file", OK)(second_file({"prompt": pa.nulls(1), "id": pa.array([4], pa.int64())}))
case("C13", "string and large_string", OK)(second_file({"prompt": pa.array(["x"], pa.large_string()), "id": [4]}))


@case("C14", "a column with the name of a result", r"output\.columns: .*'generated_text'")
def collision(folder: Path) -> Path:
    write(folder / "in" / "a.parquet", {"prompt": ["x"], "generated_text": ["y"]})
    return job(folder)


@case("C15", "ids that are not distinct: rows are known by file and number, so nothing depends on them", OK)
def repeated_ids(folder: Path) -> Path:
    write(folder / "in" / "a.parquet", {"prompt": ["x", "y"], "id": [1, 1]})
    return job(folder)


@case("C16", "no rows at all", OK)
def no_rows(folder: Path) -> Path:
    write(folder / "in" / "a.parquet", pa.table({"prompt": pa.array([], pa.string())}))
    return job(folder)


@case("C17", "an output with files that are not ours", r"out is not empty \(part-000000-0\.parquet\) and not an output")
def foreign_output(folder: Path) -> Path:
    write(folder / "out" / "part-000000-0.parquet", {"x": [1]})
    return job(folder)


@case("C17", "the output of another job", r"seed: there 1, here 0")
def others_output(folder: Path) -> Path:
    return planned(folder, seed=1)


@case("C17", "the output of another version of the format", r"protocol")
def other_protocol(folder: Path) -> Path:
    path = planned(folder)
    manifest = folder / "out" / "_job" / "manifest.json"
    record = json.loads(manifest.read_bytes())
    manifest.write_text(json.dumps(record | {"protocol": 99}))
    return path


@case("C17", "a manifest that is noise", r"is not a manifest of this version")
def noise_manifest(folder: Path) -> Path:
    (folder / "out" / "_job").mkdir(parents=True)
    (folder / "out" / "_job" / "manifest.json").write_bytes(b"\xff{")
    return job(folder)


cases(
    "C18",
    "output that is the input, inside it or around it",
    r"output\.path",
    [{"output": {"path": each}} for each in ("in", "in/x", ".")],
)
cases(
    "C19",
    "a name that is no plain name",
    r"name: .*letters, digits",
    [{"name": each} for each in ("../../x", "/abs", "..", "a\0b", "a" * 300, "%2e%2e", "s3://x", "", "-x", "a..b")],
)


def linked(target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder / "secret" / "s.parquet", {"prompt": ["s"], "id": [1]})
        os.symlink(folder / target, folder / "in" / "link.parquet")
        return job(folder)

    return make


case("C20", "a link to a file outside the input", r"input\.path: .*link out of the input folder")(
    linked("secret/s.parquet")
)
case("C20", "a link to a folder outside the input", r"input\.path: .*link out of the input folder")(linked("secret"))
case("C20", "a link to itself", r"input\.path: .*link\.parquet")(linked("in/link.parquet"))


@case("C20", "a pipe", r"input\.path: .*a pipe, socket or device")
def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "in" / "pipe.parquet")
    return job(folder)


cases("C20", "a device", r"input\.path: .*a pipe, socket or device", [{"input": {"path": "/dev/null"}}])
cases(
    "C21",
    "a scheme that is not known",
    r"input\.path: .*s3://",
    [{"input": {"path": each}} for each in ("http://host/x.parquet", "ftp://x/y", "javascript://x")],
)
cases(
    "C21",
    "a key inside a URL",
    r"input\.path: (?!.*SECRETKEY).*without credentials",
    [{"input": {"path": "s3://AKIAEXAMPLE:SECRETKEY@bucket/x"}}],
)

# C23 to C29: the model and the prompt


def model_case(number: str, what: str, wanted: str, **sections: Any) -> Callable[[Callable[[Path], None]], None]:
    """The decorated function spoils a copy of a tiny model."""

    def add(spoil: Callable[[Path], None]) -> None:
        def make(folder: Path) -> Path:
            shutil.copytree(os.environ["SEGUE_TINY_MODEL"], folder / "model")
            spoil(folder / "model")
            return job(folder, model={"source": "model", "dtype": "float32"}, **sections)

        CASES.append(Case(number, what, make, wanted))

    return add


def edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


cases(
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


cases(
    "C28",
    "a placeholder without a column",
    r"'documnet'.*",
    [{"prompt": {"messages": [{"role": "user", "content": "{documnet}"}]}}],
)
cases(
    "C28",
    "a placeholder that is an expression",
    r"prompt: (placeholder|lone)",
    [
        {"prompt": {"format": "text", "text": each}}
        for each in ("{prompt.__class__}", "{prompt[0]}", "{prompt!r:>99999}", "{}", "{a{b}}")
    ],
)
cases("C29", "GPUs that are not there", r"workers\.num_gpus", [{"workers": {"num_gpus": 8}}])


@case("C30", "a column nested 200 levels deep", r"input\.path: .*a readable Parquet file|nested")
def deep(folder: Path) -> Path:
    kind = pa.int8()
    for _ in range(200):
        kind = pa.struct({"x": kind})
    write(folder / "in" / "b.parquet", pa.table({"prompt": ["x"], "id": [1], "deep": pa.nulls(1, kind)}))
    return job(folder)


@case("C31", "20,000 columns", r"input\.path: .*20,001 columns and 1 row groups, wanted at most 10,000")
def wide(folder: Path) -> Path:
    write(folder / "in" / "a.parquet", {"prompt": ["x"], **{f"c{n}": [1] for n in range(20_000)}})
    return job(folder)


@case("C32", "columns of unknown types that nobody reads", OK)
def unread(folder: Path) -> Path:
    columns = {"prompt": ["x"], "u": pa.array([b"x" * 16], pa.uuid().storage_type), "h": pa.array([1.5], pa.float16())}
    write(folder / "in" / "a.parquet", columns)
    return job(folder, output={"path": "out", "columns": []})


@case("C33", "a folder named like a column of its files: the column counts, folders' names are not read", OK)
def hive(folder: Path) -> Path:
    shutil.rmtree(folder / "in")
    write(folder / "in" / "id=7" / "a.parquet", {"prompt": ["x"], "id": [1]})
    return job(folder)


def outcome_of(each: Case, folder: Path) -> str:
    """What came: "" if the job may start, else the refusal; anything else is raised."""
    from segue.pipeline.ledger.completeness import check_unused
    from segue.pipeline.ledger.manifest import ForeignOutput
    from segue.pipeline.problems import JobRefused
    from segue.pipeline.ready.job import existing_manifest, prepare

    good(folder)
    try:
        ready = prepare(each.make(folder))
        if existing_manifest(ready) is None:
            check_unused(ready.store)
    except (JobRefused, ForeignOutput) as refused:
        return str(refused)
    return OK


def is_expected(each: Case, got: str) -> bool:
    return got == OK if each.wanted == OK else bool(got) and re.search(each.wanted, got) is not None
