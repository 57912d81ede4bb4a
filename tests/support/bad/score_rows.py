"""Rows of scoring tasks, and prompts of rarer types, that must cost themselves and nothing else: R31 to R35 of the
bad-input matrix."""

from typing import Any

import pyarrow as pa
from bad.rows import MIB, NOTHING_PASSED, TEXT, Dataset, Row

ARABIC_ONE = "\u0661"


def scoring(task: str, **sections: Any) -> dict[str, Any]:
    limits = {"max_model_len": 500, "max_prompt_bytes": MIB, "max_error_rate": 1.0}
    return TEXT | NOTHING_PASSED | {"task": task, "limits": limits} | sections


def labelled(name: str, kind: pa.DataType, labels: dict[Any, str | None]) -> Dataset:
    """Each row has the choices x and y."""
    rows = [Row("R31", f"the label {label!r}", label, code) for label, code in labels.items()]
    others: dict[str, Any] = {"prompt": ["q"] * len(rows), "choices": [["x", "y"]] * len(rows)}
    return Dataset(name, rows, kind, "label", scoring("choose"), others, answer="choice")


def text_labels() -> Dataset:
    good = dict.fromkeys(["x", "y", "0", "1", " 1 ", "-1", "", " ", None])
    bad = dict.fromkeys(["2", "-2", "z", "X", "x ", "1.0", "0x1", "1e0", "true", "9" * 400, ARABIC_ONE], "BAD_LABEL")
    return labelled("labels that are texts", pa.string(), good | bad)


def number_labels() -> Dataset:
    bad = dict.fromkeys([2, -2, 2**62, -(2**62)], "BAD_LABEL")
    return labelled("labels that are numbers", pa.int64(), {0: None, 1: None, -1: None, None: None} | bad)


def choices() -> Dataset:
    rows = [
        Row("-", "two choices", ["a", "b"], None),
        Row("R32", "one choice", ["a"], None),
        Row("R32", "a choice twice", ["a", "a"], None),
        Row("R32", "an empty choice, before which a space is scored", ["a", ""], None),
        Row("R32", "control tokens as text", ["<|start|>", "<|end|>"], None),
        Row("R32", "no list", None, "BAD_CHOICES"),
        Row("R32", "an empty list", [], "BAD_CHOICES"),
        Row("R32", "a choice that is null", ["a", None], "BAD_CHOICES"),
        Row("R32", "10,001 choices", ["a"] * 10_001, "BAD_CHOICES"),
        Row("R8", "a choice longer than the context", ["a", "b" * 600], "PROMPT_TOO_LONG"),
        Row("R9", "a choice of 2 MB", ["a", "b" * 2 * MIB], "PROMPT_TOO_LARGE"),
    ]
    others: dict[str, Any] = {"prompt": ["q"] * len(rows)}
    return Dataset("choices", rows, pa.list_(pa.string()), "choices", scoring("choose"), others, answer="choice")


def continuations() -> Dataset:
    rows = [
        Row("-", "an ordinary one", " yes", None),
        Row("R33", "control tokens as text", "<|end|>", None),
        Row("R33", "white space", " ", None),
        Row("R33", "NUL", "a\0b", None),
        Row("R33", "null", None, "NULL_PROMPT"),
        Row("R33", "empty", "", "EMPTY_PROMPT"),
        Row("R3", "bytes that are not UTF-8", b"\xff", "BAD_UTF8"),
        Row("R8", "longer than the context", "b" * 600, "PROMPT_TOO_LONG"),
        Row("R9", "2 MB", "b" * 2 * MIB, "PROMPT_TOO_LARGE"),
    ]
    others: dict[str, Any] = {"prompt": ["q"] * len(rows)}
    sections = scoring("loglikelihood")
    return Dataset("continuations", rows, pa.string(), "continuation", sections, others, answer="logprob")


def whole_texts() -> Dataset:
    rows = [
        Row("-", "an ordinary text", "once upon a time", None),
        Row("R34", "longer than the context: in windows", "word " * 500, None),
        Row("R34", "one character", "a", None),
        Row("R34", "white space", " \n", None),
        Row("R34", "control tokens as text", "<|start|>", None),
        Row("R34", "null", None, "NULL_PROMPT"),
        Row("R34", "empty", "", "EMPTY_PROMPT"),
        Row("R3", "bytes that are not UTF-8", b"\xfe", "BAD_UTF8"),
        Row("R9", "2 MB", "b" * 2 * MIB, "PROMPT_TOO_LARGE"),
    ]
    return Dataset("whole texts", rows, pa.string(), sections=scoring("perplexity"), answer="logprob")


def texts_as(name: str, kind: pa.DataType) -> Dataset:
    """The same prompts, in a column of a rarer type."""
    rows = [
        Row("-", "an ordinary row", "hello", None),
        Row("R35", "longer than a view holds itself", "hello " * 9, None),
        Row("R35", "null", None, "NULL_PROMPT"),
        Row("R35", "empty", "", "EMPTY_PROMPT"),
        Row("R35", "bytes that are not UTF-8", b"ok \xff", "BAD_UTF8"),
        Row("R35", "longer than the context", "x" * 5000, "PROMPT_TOO_LONG"),
        Row("R35", "2 MB", "y" * 2 * MIB, "PROMPT_TOO_LARGE"),
        Row("R35", "the first row again", "hello", None),
    ]
    limits = {"max_model_len": 2000, "max_prompt_bytes": MIB, "max_error_rate": 1.0}
    return Dataset(name, rows, kind, sections=TEXT | NOTHING_PASSED | {"limits": limits})


def views() -> Dataset:
    return texts_as("prompts that are views", pa.string_view())


def large_texts() -> Dataset:
    return texts_as("prompts that are large_string", pa.large_string())


def dictionaries() -> Dataset:
    return texts_as("prompts in a dictionary", pa.dictionary(pa.int32(), pa.string()))


def struct_parameters() -> Dataset:
    kind = pa.struct([("temperature", pa.float64()), ("max_tokens", pa.int64()), ("seed", pa.int64())])
    values: list[tuple[dict[str, Any] | None, str | None]] = [
        (None, None), ({}, None), ({"max_tokens": 2}, None), ({"temperature": 0.5, "seed": 7}, None),
        ({"temperature": -1.0}, "BAD_PARAMS"), ({"temperature": float("nan")}, "BAD_PARAMS"),
        ({"temperature": float("inf")}, "BAD_PARAMS"), ({"max_tokens": 0}, "BAD_PARAMS"),
        ({"max_tokens": -(2**63)}, "BAD_PARAMS"),
    ]  # fmt: skip
    rows = [Row("R13" if code else "-", f"parameters {value}", value, code) for value, code in values]
    others: dict[str, Any] = {"prompt": [f"row {number}" for number in range(len(rows))]}
    return Dataset("parameters in a struct", rows, kind, "sampling_params", TEXT | NOTHING_PASSED, others)


def placeholders() -> Dataset:
    """A number in the prompt's text."""
    values = [0, -(2**63), 2**63 - 1, None]
    rows = [Row("R1" if value is None else "-", f"the number {value}", value, None) for value in values]
    rows[-1] = Row("R1", "no number", None, "NULL_PROMPT")
    sections = NOTHING_PASSED | {"prompt": {"format": "text", "text": "number {n}"}}
    return Dataset("placeholders", rows, pa.int64(), "n", sections)


SCORE_DATASETS = [
    text_labels, number_labels, choices, continuations, whole_texts, views, large_texts, dictionaries,
    struct_parameters, placeholders,
]  # fmt: skip
