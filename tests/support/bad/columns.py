"""Cases C12 and C35 of the bad-input matrix: types that a job cannot use, and encrypted columns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from bad.cases import OK, Cases, job, write
from parquet_files import write_encrypted

COLUMNS = Cases()
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
REPEATED = pa.struct([("role", pa.string()), ("role", pa.string()), ("content", pa.string())])
TEXTS: list[pa.DataType] = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.null(),
]
OTHERS: list[pa.DataType] = [
    pa.bool_(),
    pa.int8(),
    pa.uint64(),
    pa.float16(),
    pa.float64(),
    pa.date32(),
    pa.time64("us"),
    pa.timestamp("ns", "UTC"),
    pa.duration("ms"),
    pa.decimal128(9, 2),
    pa.decimal256(60, 2),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.binary(16),
    pa.list_(pa.string()),
    pa.list_(pa.int8(), 2),
    pa.struct({"text": pa.string()}),
    pa.map_(pa.string(), pa.string()),
    pa.dictionary(pa.int8(), pa.binary()),
    pa.uuid(),
    pa.list_view(pa.string()),
]
CHATS: list[pa.DataType] = [pa.list_(MESSAGE), pa.large_list(MESSAGE), pa.null()]
NO_CHATS: list[pa.DataType] = [
    pa.list_(pa.string()),
    MESSAGE,
    pa.list_(REPEATED),
    pa.list_(pa.struct({"role": pa.string()})),
    pa.list_(MESSAGE, 2),
    pa.list_(pa.struct([("role", pa.int8()), ("content", pa.string())])),
    pa.map_(pa.string(), pa.string()),
    pa.int64(),
]


def one_column(name: str, kind: pa.DataType, others: dict[str, Any], **sections: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder / "in" / "a.parquet", pa.table({name: pa.nulls(1, kind), **others}))
        return job(folder, **({"output": {"path": "out", "columns": []}} | sections))

    return make


for kind in (*TEXTS, *OTHERS):
    wanted = OK if kind in TEXTS else r"column 'prompt' of type"
    COLUMNS.case("C12", f"a prompt of type {kind}", wanted)(one_column("prompt", kind, {}))
for kind in (*CHATS, *NO_CHATS):
    # A list of a fixed size is one, too.
    wanted = OK if kind in CHATS or pa.types.is_fixed_size_list(kind) else r"column 'messages' of type"
    COLUMNS.case("C12", f"messages of type {kind}", wanted)(one_column("messages", kind, {"id": [1]}))

CHOOSE = {"task": "choose", "prompt": {"format": "text", "text": "{prompt}"}}
for kind in (pa.string(), pa.list_(pa.int8()), pa.struct({"a": pa.string()}), pa.map_(pa.string(), pa.string())):
    make = one_column("choices", kind, {"prompt": ["x"]}, **CHOOSE)
    COLUMNS.case("C12", f"choices of type {kind}", r"scoring\.choices_column: .*column 'choices' of type")(make)
for kind in (pa.float64(), pa.bool_(), pa.list_(pa.int8()), pa.date32()):
    make = one_column("label", kind, {"prompt": ["x"], "choices": [["a", "b"]]}, **CHOOSE)
    COLUMNS.case("C12", f"a label of type {kind}", r"scoring\.label_column: .*column 'label' of type")(make)
for kind in (pa.int8(), pa.list_(pa.string()), pa.map_(pa.string(), pa.int8())):
    make = one_column("sampling_params", kind, {"prompt": ["x"]})
    COLUMNS.case("C12", f"sampling_params of type {kind}", r"sampling_params: .*of type")(make)
for kind in (pa.list_view(pa.int8()), pa.large_list_view(pa.string()), pa.struct({"a": pa.list_view(pa.int8())})):
    make = one_column("odd", kind, {"prompt": ["x"]}, output={"path": "out"})
    COLUMNS.case("C35", f"a passed-through column of type {kind}", r"output\.columns: .*column 'odd' of type")(make)


def encrypted(*leaves: str, **sections: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        table = pa.table({"prompt": ["x"], "id": [1], "secret": ["s"], "deep": [{"a": [1]}]})
        write_encrypted(folder / "in" / "a.parquet", table, list(leaves))
        return job(folder, **sections)

    return make


COLUMNS.case("C35", "a prompt that is encrypted", r"prompt: .*'prompt', which is encrypted")(encrypted("prompt"))
COLUMNS.case("C35", "a passed-through column that is encrypted", r"output\.columns: .*'secret', which is encrypted")(
    encrypted("secret")
)
COLUMNS.case("C35", "a part of a column that is encrypted", r"output\.columns: .*'deep', which is encrypted")(
    encrypted("deep.a.list.element")
)
COLUMNS.case("C35", "an encrypted column that nobody reads", OK)(
    encrypted("secret", output={"path": "out", "columns": ["id", "deep"]})
)
COLUMNS.case("C35", "a filter on an encrypted column", r"input\.filters: .*'secret', which is encrypted")(
    encrypted(
        "secret", input={"path": "in", "filters": [["secret", "==", None]]}, output={"path": "out", "columns": []}
    )
)
