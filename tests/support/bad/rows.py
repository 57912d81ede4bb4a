"""Rows that must cost themselves and nothing else, by the numbers of the bad-input matrix (R1 to R30).

Each dataset is one run. Its rows say what error they must have, or none; good rows stand between the bad ones.
"""

from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bad.cases import job, write

from segue.pipeline.dataset.columns import is_text

MIB = 2**20
ROLE, CONTENT = ("role", pa.string()), ("content", pa.string())
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
    "{% if 'RAISE' in m.content %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@dataclass(frozen=True)
class Row:
    """One row of a dataset."""

    number: str
    what: str
    value: Any  # of the dataset's column
    code: str | None  # of the error that it must have


@dataclass(frozen=True)
class Dataset:
    """Rows of one column, which one job reads."""

    name: str
    rows: list[Row]
    kind: pa.DataType | None = None
    column: str = "prompt"
    sections: dict[str, Any] = field(default_factory=dict)  # of the job file
    others: dict[str, list[Any] | pa.Array] = field(default_factory=dict)  # columns
    options: dict[str, Any] = field(default_factory=dict)  # of the Parquet writer
    answer: str = "generated_text"  # a column of the output that is null in rows with an error

    def write(self, folder: Path) -> Path:
        """The job file, beside its data."""
        values = [row.value for row in self.rows]
        if self.kind is not None and is_text(self.kind):  # of bytes, as some are no text
            binary = pa.array([v.encode() if isinstance(v, str) else v for v in values], pa.binary())
            column = binary.view(pa.string()).cast(self.kind)
        else:
            column = pa.array(values, self.kind)
        write(folder / "in" / "a.parquet", pa.table({self.column: column} | self.others), **self.options)
        return job(folder, **({"limits": {"max_error_rate": 1.0}} | self.sections))

    @property
    def codes(self) -> dict[int, str | None]:
        return {number: row.code for number, row in enumerate(self.rows)}


TEXT = {"prompt": {"format": "text", "text": "{prompt}"}}
NOTHING_PASSED = {"output": {"path": "out", "columns": []}}


def texts() -> Dataset:
    limits = {"max_model_len": 2000, "max_prompt_bytes": MIB, "max_error_rate": 1.0}
    rows = [
        Row("-", "an ordinary row", "hello", None),
        Row("R1", "null", None, "NULL_PROMPT"),
        Row("R2", "empty", "", "EMPTY_PROMPT"),
        Row("R2", "white space", " \n\t\u00a0", "EMPTY_PROMPT"),
        Row("R3", "bytes that are not UTF-8", b"ok \xff\xfe", "BAD_UTF8"),
        Row("R4", "half of a surrogate pair, as bytes", b"\xed\xa0\x80", "BAD_UTF8"),
        Row("R5", "NUL and control characters", "a\0b\x1b[31m\x07", None),
        Row("R6", "bidi, zero width, homoglyphs", "\u202eabc\u200b \u0430", None),
        Row("R7", "control tokens as text", "<|im_start|>system</s>[INST]<tool_call>", None),
        Row("R8", "longer than the context", "x" * 5000, "PROMPT_TOO_LONG"),
        Row("R9", "100 MB", "y" * 100 * MIB, "PROMPT_TOO_LARGE"),
        Row("R10", "a million spaces and a letter", " " * 1_000_000 + "x", "PROMPT_TOO_LONG"),
        Row("R11", "prompt and answer together longer than the context", "z" * 1998, None),
        Row("R14", "a prompt that is there already", "hello", None),
        Row("R20", "repeats until max_tokens", "aaaa", None),
        Row("R29", "a formula", "=cmd()|'/c calc'!A1", None),
        Row("R30", "HTML and ANSI", "<script>alert(1)</script>\x1b]0;title\x07", None),
        Row("-", "an ordinary row at the end", "bye", None),
    ]
    return Dataset("texts", rows, pa.string(), sections=TEXT | NOTHING_PASSED | {"limits": limits})


def chats() -> Dataset:
    def said(*messages: tuple[str | None, str | None]) -> list[dict[str, str | None]]:
        return [{"role": role, "content": content} for role, content in messages]

    rows = [
        Row("-", "an ordinary chat", said(("user", "hello")), None),
        Row("R12", "no messages", [], "BAD_MESSAGES"),
        Row("R1", "null", None, "NULL_PROMPT"),
        Row("R12", "an unknown role", said(("root", "hello")), "BAD_MESSAGES"),
        Row("R12", "a role that is null", said((None, "hello")), "BAD_MESSAGES"),
        Row("R12", "a content that is null", said(("user", None)), "BAD_MESSAGES"),
        Row("R12", "10,000 messages", said(*[("user", "x")] * 10_000), "BAD_MESSAGES"),
        Row("R2", "nothing but white space", said(("user", " "), ("user", "\n")), "EMPTY_PROMPT"),
        Row("R22", "a template that raises", said(("user", "RAISE")), "TEMPLATE_ERROR"),
        Row("-", "a chat of several turns", said(("user", "a"), ("assistant", "b"), ("user", "c")), None),
    ]
    return Dataset("chats", rows, pa.list_(pa.struct([ROLE, CONTENT])), "messages", {"prompt": {"chat_template": CHAT}})


def parts() -> Dataset:
    part = pa.struct([("type", pa.string()), ("text", pa.string()), ("image_url", pa.string())])
    kind = pa.list_(pa.struct([ROLE, ("content", pa.list_(part))]))

    def said(*contents: dict[str, str]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": list(contents)}]

    url = "http://127.0.0.1:9/secret.png"
    rows = [
        Row("-", "text parts", said({"type": "text", "text": "a"}, {"type": "text", "text": "b"}), None),
        Row("R23", "an image", said({"type": "image_url", "image_url": url}), "UNSUPPORTED_CONTENT"),
        Row(
            "R23", "a text with an image", said({"type": "text", "text": "a", "image_url": url}), "UNSUPPORTED_CONTENT"
        ),
        Row("R23", "audio", said({"type": "input_audio", "text": url}), "UNSUPPORTED_CONTENT"),
        Row("R12", "a text part without text", said({"type": "text"}), "BAD_MESSAGES"),
        Row("-", "a URL in a text is text", said({"type": "text", "text": url}), None),
    ]
    return Dataset("parts", rows, kind, "messages", {"prompt": {"chat_template": CHAT}})


def parameters() -> Dataset:
    values = [
        (None, None), ('{"max_tokens": 2}', None), ("{", "BAD_PARAMS"), ("[]", "BAD_PARAMS"), ("7", "BAD_PARAMS"),
        ('{"temperature": -1}', "BAD_PARAMS"), ('{"top_p": 0}', "BAD_PARAMS"), ('{"max_tokens": 0}', "BAD_PARAMS"),
        ('{"temperature": NaN}', "BAD_PARAMS"), ('{"max_token": 3}', "BAD_PARAMS"), ('{"n": 1000000}', "BAD_PARAMS"),
        ("[" * 100_000, "BAD_PARAMS"), ('{"max_tokens": "9"}', "BAD_PARAMS"), ('{"seed": 3}', None),
        ('{"temperature": 1e-39}', None), ('{"temperature": 1e308}', None), ('{"top_k": 9223372036854775808}', None),
        ('{"repetition_penalty": 1e-320}', None), ('{"seed": 9223372036854775808}', "BAD_PARAMS"),
        ('{"stop_token_ids": [-1]}', "BAD_PARAMS"), ('{"logit_bias": {"5": 1e300}}', None),
        ('{"logit_bias": {"word": 1}}', "BAD_PARAMS"), ('{"logit_bias": {"-1": 1}}', "BAD_PARAMS"),
        ('{"logit_bias": [[5]]}', "BAD_PARAMS"), ('{"allowed_token_ids": []}', "BAD_PARAMS"),
        ('{"bad_words": [" "]}', "BAD_PARAMS"), ('{"bad_words": "word"}', "BAD_PARAMS"),
        ('{"truncate_prompt_tokens": 0}', "BAD_PARAMS"), ('{"truncate_prompt_tokens": 3}', None),
    ]  # fmt: skip
    rows = [Row("R13" if code else "-", f"sampling_params {str(value)[:30]}", value, code) for value, code in values]
    return Dataset(
        "parameters", rows, pa.string(), "sampling_params", TEXT | NOTHING_PASSED,
        {"prompt": [f"row {number}" for number in range(len(rows))]},
    )  # fmt: skip


def types() -> Dataset:
    numbers = ("R27", "R28", "R15")  # types, extreme values, an id that is there already
    rows = [Row(number, "a row of every type", f"row {number}", None) for number in numbers]
    others: dict[str, list[Any] | pa.Array] = {
        "decimal": [Decimal("1.10"), None, Decimal("-0.01")],
        "float": [float("nan"), -0.0, float("inf")],
        "int": pa.array([2**63 - 1, -(2**63), None], pa.int64()),
        "time": pa.array([1, None, 2**62], pa.timestamp("ns", "UTC")),
        "bytes": [b"\xff\0", b"", None],
        "map": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int8())),
        "formula": ["=1+1", "<b>", "\x1b[0m"],
        "id": [1, 1, 1],
    }
    return Dataset("types", rows, pa.string(), sections=TEXT, others=others)


def bombs() -> Dataset:
    rows = [
        Row("-", "an ordinary row", "hello", None),
        Row("R19", "a template that loops for ever", "LOOP", "ROW_TIMEOUT"),
        Row("R22", "a template that writes 9 GB", "LONG", "ROW_OOM"),
        Row("R22", "a template with a width of 9 billion", "WIDE", "ROW_OOM"),
        Row("-", "an ordinary row at the end", "bye", None),
    ]
    template = (
        "{% for m in messages %}{{ m.content }}"
        "{% if 'LOOP' in m.content %}" + LOOP + "{% endif %}"
        "{% if 'LONG' in m.content %}{{ 'a' * 9000000000 }}{% endif %}"
        "{% if 'WIDE' in m.content %}{{ '{:>9000000000}'.format(1) }}{% endif %}{% endfor %}"
    )
    limits = {"row_cpu_s": 2, "row_memory_bytes": 256 * MIB, "max_error_rate": 1.0}
    return Dataset("bombs", rows, pa.string(), sections={"prompt": {"chat_template": template}, "limits": limits})


def dictionary_bomb() -> Dataset:
    """A kilobyte that is half a gigabyte of text."""
    rows = [Row("R26", "5 MB from a dictionary", "a" * 5 * MIB, "PROMPT_TOO_LARGE")] * 100
    limits = {"row_memory_bytes": 128 * MIB, "max_error_rate": 1.0}
    return Dataset(
        "dictionary bomb",
        [Row("-", "an ordinary row", "hello", None), *rows],
        pa.string(),
        sections=TEXT | NOTHING_PASSED | {"limits": limits},
        options={"compression": "zstd", "dictionary_pagesize_limit": 2**30},
    )


def damaged_page() -> Dataset:
    """Three row groups, of which the second has a byte that is not what its checksum says."""
    rows = [Row("-", f"row {n} of a sound row group", f"row {n} " + "x" * 50, None) for n in range(30)]
    for n in range(10, 20):
        rows[n] = Row("R24", "a row in a page with a flipped byte", rows[n].value, "INPUT_CORRUPT")
    options = {"row_group_size": 10, "use_dictionary": False, "write_page_checksum": True, "compression": "none"}

    class Damaged(Dataset):
        def write(self, folder: Path) -> Path:
            written = super().write(folder)
            path = folder / "in" / "a.parquet"
            content = bytearray(path.read_bytes())
            content[content.index(b"row 15 ")] ^= 1
            path.write_bytes(content)
            return written

    return Damaged("damaged page", rows, pa.string(), sections=TEXT, options=options)


def deadly() -> Dataset:
    """Rows that end a worker, which is a process to be started each time."""
    rows = [Row("-", f"an ordinary row {n}", f"fine {n}", None) for n in range(24)]
    rows[5] = Row("R16", "a row that ends its worker", "POISON", "WORKER_CRASH")
    rows[17] = Row("R19", "a row at which its worker hangs", "STUCK", "ROW_TIMEOUT")
    sections = TEXT | {
        "model": {"source": "echo?crash=POISON&hang=STUCK"},
        "output": {"path": "out", "max_rows_per_file": 4},
        "workers": {"step_timeout_s": 8},
    }
    return Dataset("deadly", rows, pa.string(), sections=sections)


def numeric() -> Dataset:
    """Rows for a model of 20 kB with a weight that is not a number, and little memory for keys and values."""
    rows = [
        Row("-", "an ordinary row", "hello", None),
        Row("R17", "more keys and values than memory", "x" * 450, "ROW_OOM"),
        Row("R18", "a token whose embedding is NaN", "hello ~", "NUMERIC_ERROR"),
        Row("R21", "answers of random bytes, which are no UTF-8", "bytes", None),
        Row("-", "an ordinary row at the end", "bye", None),
    ]

    class OfNanModel(Dataset):
        def write(self, folder: Path) -> Path:
            from tiny_models import tiny_model, tiny_tokenizer

            model, tokenizer = tiny_model("llama"), tiny_tokenizer()
            (token,) = tokenizer("~", add_special_tokens=False).input_ids
            model.get_input_embeddings().weight.data[token] = float("nan")
            model.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
            return super().write(folder)

    sections = TEXT | {"model": {"source": "model", "dtype": "float32"}, "workers": {"kv_cache_memory_bytes": 2**17}}
    return OfNanModel("numeric", rows, pa.string(), sections=sections)


def errors_in(output: Path) -> dict[int, str | None]:
    """Of each row of a finished output its error's code."""
    tables = [pq.read_table(path, columns=["src_row", "error"]) for path in sorted(output.glob("part-*.parquet"))]
    rows = pa.concat_tables(tables).to_pylist()
    assert len({row["src_row"] for row in rows}) == len(rows), "a row is there twice"
    return {row["src_row"]: row["error"] and row["error"]["code"] for row in rows}


DATASETS = [texts, chats, parts, parameters, types, bombs, dictionary_bomb, damaged_page, numeric]
NEED_CHILDREN = [bombs, dictionary_bomb]  # rows that end the process which prepares them
SLOW_DATASETS = [deadly]  # a minute; tests/faults/test_faults.py has its like
