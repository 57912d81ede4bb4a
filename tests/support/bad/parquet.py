"""Parquet files that no writer makes, byte by byte: what apache/parquet-testing keeps in `bad.data`, rebuilt.

A file of one column `prompt` is put together from a footer and pages whose headers may say anything. Knows Thrift's
compact protocol as far as Parquet's metadata needs it.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Union

MAGIC = b"PAR1"
BYTE_ARRAY, FIXED = 6, 7
REQUIRED, OPTIONAL, REPEATED = 0, 1, 2
PLAIN, RLE, RLE_DICTIONARY = 0, 3, 8
DATA_PAGE, DICTIONARY_PAGE = 0, 2
_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _zigzag(number: int) -> bytes:
    return _varint((number << 1) ^ (number >> 63))


Value = Union[int, str, list["Value"], "Struct"]


@dataclass(frozen=True)
class Struct:
    """A Thrift struct by field numbers; `wide` fields are 64-bit."""

    fields: dict[int, Value]
    wide: frozenset[int] = frozenset()

    def encoded(self) -> bytes:
        out, last = b"", 0
        for number, value in sorted(self.fields.items()):
            kind = _kind(value, is_wide=number in self.wide)
            out += bytes([(number - last) << 4 | kind]) + _encoded(value)
            last = number
        return out + b"\0"


def _kind(value: Value, *, is_wide: bool = False) -> int:
    if isinstance(value, int):
        return _I64 if is_wide else _I32
    return {str: _BINARY, list: _LIST, Struct: _STRUCT}[type(value)]


def _encoded(value: Value) -> bytes:
    if isinstance(value, int):
        return _zigzag(value)
    if isinstance(value, str):
        return _varint(len(value.encode())) + value.encode()
    if isinstance(value, list):
        kind = _kind(value[0]) if value else _I32
        size = bytes([len(value) << 4 | kind]) if len(value) < 15 else bytes([0xF0 | kind]) + _varint(len(value))
        return size + b"".join(map(_encoded, value))
    return value.encoded()


def plain(texts: Sequence[str]) -> bytes:
    return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)


def levels(runs: Sequence[tuple[int, int]]) -> bytes:
    """Repetition or definition levels of at most 1, as (how many, which level), with their length in front."""
    body = b"".join(_varint(count << 1) + bytes([level]) for count, level in runs)
    return struct.pack("<I", len(body)) + body


@dataclass(frozen=True)
class Page:
    """A page as its header describes it, whatever its content is."""

    content: bytes
    num_values: int
    encoding: int = PLAIN
    kind: int = DATA_PAGE

    def encoded(self) -> bytes:
        about: dict[int, Value] = {1: self.num_values, 2: self.encoding}
        if self.kind == DATA_PAGE:
            about |= {3: RLE, 4: RLE}
        size = len(self.content)
        header: dict[int, Value] = {1: self.kind, 2: size, 3: size}
        header[5 if self.kind == DATA_PAGE else 7] = Struct(about)
        return Struct(header).encoded() + self.content


@dataclass(frozen=True)
class File:
    """Row groups of one column, all alike."""

    pages: tuple[Page, ...]
    num_rows: int  # of its row group
    repetition: int = REQUIRED
    physical: int = BYTE_ARRAY
    converted: int = 0  # UTF8
    all_rows: int | None = None  # what the footer says of the whole file, if it is something else
    encodings: list[int] = field(default_factory=lambda: [PLAIN, RLE, RLE_DICTIONARY])
    num_groups: int = 1

    def content(self) -> bytes:
        body = b"".join(page.encoded() for page in self.pages)
        groups: list[Value] = [self._group(body, len(MAGIC) + number * len(body)) for number in range(self.num_groups)]
        root = Struct({4: "schema", 5: 1})
        leaf: dict[int, Value] = {1: self.physical, 3: self.repetition, 4: "prompt", 6: self.converted}
        all_rows = self.num_rows * self.num_groups if self.all_rows is None else self.all_rows
        footer = Struct({1: 1, 2: [root, Struct(leaf)], 3: all_rows, 4: groups}, frozenset({3})).encoded()
        return MAGIC + body * self.num_groups + footer + struct.pack("<I", len(footer)) + MAGIC

    def _group(self, body: bytes, offset: int) -> Struct:
        first = self.pages[0].encoded() if self.pages[0].kind == DICTIONARY_PAGE else b""
        column: dict[int, Value] = {
            1: self.physical, 2: list[Value](self.encodings), 3: ["prompt"], 4: 0, 5: self.num_rows,
            6: len(body), 7: len(body), 9: offset + len(first),
        }  # fmt: skip
        if first:
            column[11] = offset
        meta = Struct(column, frozenset({5, 6, 7, 9, 10, 11}))
        chunk = Struct({2: offset, 3: meta}, frozenset({2}))
        return Struct({1: [chunk], 2: len(body), 3: self.num_rows}, frozenset({2, 3}))


TEXTS = ["one", "two", "three", "four"]
_DICTIONARY = Page(plain(TEXTS), len(TEXTS), kind=DICTIONARY_PAGE)
_INDICES = Page(b"\x02\x03" + b"\xe4\x00", 4, RLE_DICTIONARY)  # two bits each: 0, 1, 2, 3
GOOD = File((Page(plain(TEXTS), 4),), 4)
GOOD_DICTIONARY = File((_DICTIONARY, _INDICES), 4)

# What is wrong, and the file. These names are those of apache/parquet-testing's files.
BAD_FILES: dict[str, tuple[str, File]] = {
    "PARQUET-1481": ("the schema has a type that does not exist", replace(GOOD, physical=77)),
    "ARROW-RS-GH-6229-DICTHEADER": (
        "a dictionary of -4 values",
        replace(GOOD_DICTIONARY, pages=(replace(_DICTIONARY, num_values=-4), _INDICES)),
    ),
    "ARROW-RS-GH-6229-LEVELS": (
        "a page with fewer repetition levels than values",
        File((Page(levels([(1, 0)]) + levels([(4, 1)]) + plain(TEXTS), 4),), 4, repetition=REPEATED),
    ),
    "ARROW-GH-41321": (
        "a page with fewer definition levels than values",
        File((Page(levels([(2, 1)]) + plain(TEXTS), 4),), 4, repetition=OPTIONAL),
    ),
    "ARROW-GH-41317": ("a column with fewer values than there are rows", replace(GOOD, num_rows=7)),
    "ARROW-GH-43605": (
        "indices of no bits, which all mean the first value",
        replace(GOOD_DICTIONARY, pages=(_DICTIONARY, Page(b"\x00\x08", 4, RLE_DICTIONARY))),
    ),
    "ARROW-GH-45185": (
        "repetition levels that begin inside a row",
        File((Page(levels([(1, 1), (3, 0)]) + levels([(4, 1)]) + plain(TEXTS), 4),), 4, repetition=REPEATED),
    ),
    "ARROW-GH-47662": (
        "a required column whose page holds fewer values than it says",
        File((Page(plain(TEXTS[:2]), 4),), 4),
    ),
}

# Others of the same kind.
BAD_FILES |= {
    "an index": (
        "indices of values that the dictionary does not have",
        replace(GOOD_DICTIONARY, pages=(Page(plain(TEXTS[:2]), 2, kind=DICTIONARY_PAGE), _INDICES)),
    ),
    "an unknown page": ("a page of a kind that does not exist", File((Page(plain(TEXTS), 4, kind=9),), 4)),
    "an unknown encoding": ("a page of an encoding that does not exist", File((Page(plain(TEXTS), 4, 77),), 4)),
    "fewer than none": ("a page of -1 values", File((Page(plain(TEXTS), -1),), 4)),
    "a long text": ("a text whose length is said to be 2 GiB", File((Page(b"\xff\xff\xff\x7f" + plain(TEXTS), 4),), 4)),
    "a negative text": (
        "a text whose length is said to be -1",
        File((Page(b"\xff\xff\xff\xff" + plain(TEXTS), 4),), 4),
    ),
    "no pages": ("a column without a page", File((Page(b"", 0),), 4)),
    "more values": ("a column with more values than there are rows", File((Page(plain(TEXTS * 2), 8),), 4)),
}


def write_all(folder: str, write: Callable[[str, bytes], object]) -> None:
    """Each bad file by `write(path, content)`."""
    for name, (_, file) in BAD_FILES.items():
        write(f"{folder}/{name}.parquet", file.content())
