"""Cases C8 to C21 and C30 to C33 of the bad-input matrix: the dataset, the output and the job's name."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from bad.cases import OK, Cases, job, write
from bad.parquet import GOOD
from in_process import without_children
from ready_jobs import ready_job

from segue.pipeline.plan.windows import plan_next

DATA = Cases()


def planned(folder: Path, **sections: Any) -> Path:
    """The job file of a good job, after another was planned into its output."""
    with without_children():
        plan_next(ready_job(job(folder, **sections)), None)
    return job(folder)


DATA.cases("C8", "input that is not there", r"input\.path: .*does not exist", [{"input": {"path": "nowhere"}}])
DATA.cases("C8", "a glob that matches nothing", r"input\.path: .*no input file", [{"input": {"path": "in/*.csv"}}])


@DATA.case("C8", "a folder without Parquet files", r"input\.path: .*no input file")
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
    DATA.case("C9", f"a file {what}", r"input\.path: .*b\.parquet.*wanted a readable Parquet file")(damaged(change))


for num_rows, all_rows in ((4, 100), (4, 2), (-5, -5)):

    @DATA.case(
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


DATA.case("C10", "a file without the prompt's column", r"b\.parquet without column 'prompt'")(
    second_file({"text": ["x"], "id": [4]})
)
DATA.case("C11", "a column in other case", r"did you mean 'Prompt'")(second_file({"Prompt": ["x"], "id": [4]}))
DATA.case("C11", "a column twice", r"2 columns 'prompt'")(
    second_file(pa.table([["x"], ["y"], [4]], names=["prompt", "prompt", "id"]))
)
DATA.case("C12", "a prompt that is a number", r"prompt.*int64")(second_file({"prompt": [1], "id": [4]}))
DATA.case("C12", "messages of another shape", r"messages.*list<")(
    second_file({"messages": [["x"]], "prompt": ["x"], "id": [4]}, input={"path": "in/b.parquet"})
)
DATA.case("C13", "a column of two types", r"'id'.*(double|int64)")(second_file({"prompt": ["x"], "id": [4.5]}))
DATA.case("C13", "a column of nulls in one file", OK)(
    second_file({"prompt": pa.nulls(1), "id": pa.array([4], pa.int64())})
)
DATA.case("C13", "string and large_string", OK)(second_file({"prompt": pa.array(["x"], pa.large_string()), "id": [4]}))


@DATA.case("C14", "a column with the name of a result", r"output\.columns: .*'generated_text'")
def collision(folder: Path) -> Path:
    write(folder / "in" / "a.parquet", {"prompt": ["x"], "generated_text": ["y"]})
    return job(folder)


@DATA.case("C15", "ids that are not distinct: rows are known by file and number, so nothing depends on them", OK)
def repeated_ids(folder: Path) -> Path:
    write(folder / "in" / "a.parquet", {"prompt": ["x", "y"], "id": [1, 1]})
    return job(folder)


@DATA.case("C16", "no rows at all", OK)
def no_rows(folder: Path) -> Path:
    write(folder / "in" / "a.parquet", pa.table({"prompt": pa.array([], pa.string())}))
    return job(folder)


@DATA.case(
    "C17", "an output with files that are not ours", r"out is not empty \(part-000000-0\.parquet\) and not an output"
)
def foreign_output(folder: Path) -> Path:
    write(folder / "out" / "part-000000-0.parquet", {"x": [1]})
    return job(folder)


@DATA.case("C17", "the output of another job", r"seed: there 1, here 0")
def others_output(folder: Path) -> Path:
    return planned(folder, seed=1)


@DATA.case("C17", "the output of another version of the format", r"protocol")
def other_protocol(folder: Path) -> Path:
    path = planned(folder)
    manifest = folder / "out" / "_job" / "manifest.json"
    record = json.loads(manifest.read_bytes())
    manifest.write_text(json.dumps(record | {"protocol": 99}))
    return path


@DATA.case("C17", "a manifest that is noise", r"is not a manifest of this version")
def noise_manifest(folder: Path) -> Path:
    (folder / "out" / "_job").mkdir(parents=True)
    (folder / "out" / "_job" / "manifest.json").write_bytes(b"\xff{")
    return job(folder)


DATA.cases(
    "C18",
    "output that is the input, inside it or around it",
    r"output\.path",
    [{"output": {"path": each}} for each in ("in", "in/x", ".")],
)
DATA.cases(
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


DATA.case("C20", "a link to a file outside the input", r"input\.path: .*link out of the input folder")(
    linked("secret/s.parquet")
)
DATA.case("C20", "a link to a folder outside the input", r"input\.path: .*link out of the input folder")(
    linked("secret")
)
DATA.case("C20", "a link to itself", r"input\.path: .*link\.parquet")(linked("in/link.parquet"))


@DATA.case("C20", "a pipe", r"input\.path: .*a pipe, socket or device")
def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "in" / "pipe.parquet")
    return job(folder)


DATA.cases("C20", "a device", r"input\.path: .*a pipe, socket or device", [{"input": {"path": "/dev/null"}}])
DATA.cases(
    "C21",
    "a scheme that is not known",
    r"input\.path: .*s3://",
    [{"input": {"path": each}} for each in ("http://host/x.parquet", "ftp://x/y", "javascript://x")],
)
DATA.cases(
    "C21",
    "a key inside a URL",
    r"input\.path: (?!.*SECRETKEY).*without credentials",
    [{"input": {"path": "s3://AKIAEXAMPLE:SECRETKEY@bucket/x"}}],
)


@DATA.case("C30", "a column nested 200 levels deep", r"input\.path: .*a readable Parquet file|nested")
def deep(folder: Path) -> Path:
    kind = pa.int8()
    for _ in range(200):
        kind = pa.struct({"x": kind})
    write(folder / "in" / "b.parquet", pa.table({"prompt": ["x"], "id": [1], "deep": pa.nulls(1, kind)}))
    return job(folder)


@DATA.case("C31", "20,000 columns", r"input\.path: .*20,001 columns and 1 row groups, wanted at most 10,000")
def wide(folder: Path) -> Path:
    write(folder / "in" / "a.parquet", {"prompt": ["x"], **{f"c{n}": [1] for n in range(20_000)}})
    return job(folder)


@DATA.case("C32", "columns of unknown types that nobody reads", OK)
def unread(folder: Path) -> Path:
    columns = {"prompt": ["x"], "u": pa.array([b"x" * 16], pa.uuid().storage_type), "h": pa.array([1.5], pa.float16())}
    write(folder / "in" / "a.parquet", columns)
    return job(folder, output={"path": "out", "columns": []})


@DATA.case("C33", "a folder named like a column of its files: the column counts, folders' names are not read", OK)
def hive(folder: Path) -> Path:
    shutil.rmtree(folder / "in")
    write(folder / "in" / "id=7" / "a.parquet", {"prompt": ["x"], "id": [1]})
    return job(folder)
