"""Files that other readers change or choke on: what becomes of them, or why they are refused.

Every case is a file, how it is read, and the rows and types that it must have, or a part of the refusal.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import last_line, segue

from segue.pipeline.formats.column_types import parse_types
from segue.pipeline.formats.convert import ReadOptions, to_parquet
from segue.pipeline.problems import JobRefused


def converted(folder: Path, name: str, content: str | bytes, types: str = "", **options: Any) -> tuple[list[str], list]:
    """(types, values of the rows)"""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    read = ReadOptions(types=parse_types([types] if types else []), **options)
    found = to_parquet(str(folder / name), str(folder / "data"), 100, read)
    table = pa.concat_tables(pq.read_table(path) for path in sorted((folder / "data").glob("*.parquet")))
    assert found.num_rows == table.num_rows
    return list(found.types), [list(row.values()) for row in table.to_pylist()]


TEXTS = ["string", "string"]
KEPT = {
    "leading zeros and plus": ("a.csv", "z,p\n01234,+491234\n", {}, TEXTS, [["01234", "+491234"]]),
    "all NA": ("a.csv", "a,b\nNA,null\nNA,NaN\n", {}, TEXTS, [["NA", "null"], ["NA", "NaN"]]),
    "null and empty": ("a.csv", 'a,b\n,""\n', {}, TEXTS, [[None, ""]]),
    "quotes that are doubled": ("a.csv", 'a,b\n"""","",\n', None, None, None),
    "a header alone": ("a.csv", "a,b\n", {}, TEXTS, []),
    "BOM, CRLF, quoted line break": ("a.csv", '\ufeffa,b\r\n"x\r\ny",2\r\n', {}, TEXTS, [["x\r\ny", "2"]]),
    "a quote inside a field": ("a.csv", 'a,b\n5" nail,x\n', {}, TEXTS, [['5" nail', "x"]]),
    "blank lines": ("a.csv", "a\n\nx\n\n", {}, ["string"], [["x"]]),
    "a long field": ("a.csv", f"a\n{'x' * 300_000}\n", {}, ["string"], [["x" * 300_000]]),
    "an index of pandas": ("a.csv", ",a\n0,x\n", {}, TEXTS, [["0", "x"]]),
    "latin-1 that is asked for": ("a.csv", "a\n\xe9".encode("latin-1"), {"encoding": "latin-1"}, ["string"], [["é"]]),
    "semicolons that are asked for": ("a.csv", "a;b\n1;2\n", {"delimiter": ";"}, TEXTS, [["1", "2"]]),
    "inferred": ("a.csv", "i,x,b,z\n12,1.5,true,01\n,2,FALSE,2\n", {"infer": True},
                 ["int64", "double", "bool", "string"], [[12, 1.5, True, "01"], [None, 2.0, False, "2"]]),
    "inference of what is no double": ("a.csv", "a,b\n1e400,0.1234567890123456789\n", {"infer": True}, TEXTS,
                                       [["1e400", "0.1234567890123456789"]]),
    "inference beside named types": ("a.csv", "a,b\n7,7\n", {"infer": True, "types": "a=string"},
                                     ["string", "int64"], [["7", 7]]),
    "dates in JSON": ("a.jsonl", '{"d": "2024-01-02", "t": "2024-01-02T03:04:05+02:00"}', {}, TEXTS,
                      [["2024-01-02", "2024-01-02T03:04:05+02:00"]]),
    "unsigned integers": ("a.jsonl", '{"i": 12345678901234567890}', {}, ["uint64"], [[12345678901234567890]]),
    "the largest int64": ("a.jsonl", '{"i": 9223372036854775807}', {}, ["int64"], [[2**63 - 1]]),
    "huge integers as text": ("a.jsonl", '{"i": 36893488147419103232}', {"types": "i=string"}, ["string"],
                              [["36893488147419103232"]]),
    "integers and fractions": ("a.jsonl", '{"x": 1}\n{"x": 0.5}', {}, ["double"], [[1.0], [0.5]]),
    "mixed types as JSON": ("a.jsonl", '{"x": 1.10}\n{"x": "a"}\n{"x": {"k": [1, null]}}\n{}', {"types": "x=json"},
                            ["string"], [["1.10"], ['"a"'], ['{"k": [1, null]}'], [None]]),
    "empty objects as JSON": ("a.jsonl", '{"metadata": {}}', {"types": "metadata=json"}, ["string"], [["{}"]]),
    "an empty object beside others": ("a.jsonl", '{"m": {}}\n{"m": {"k": 1}}', {},
                                      ["struct<k: int64>"], [[{"k": None}], [{"k": 1}]]),
    "an array of objects": ("a.json", ' [{"a": "x"},\n {"a": "y"}]\n', {}, ["string"], [["x"], ["y"]]),
    "a BOM in JSON": ("a.jsonl", '\ufeff{"a": 1}\n\n{"a": 2}\r\n', {}, ["int64"], [[1], [2]]),
    "breaks that are no lines": ("a.jsonl", '{"a": "x\u2028y\x85z"}\n', {}, ["string"], [["x\u2028y\x85z"]]),
    "a key that comes late": ("a.jsonl", '{"a": 1}\n' * 3000 + '{"b": [1]}', {}, ["int64", "list<element: int64>"],
                              [[1, None]] * 3000 + [[None, [1]]]),
    "gzip": ("a.jsonl.gz", gzip.compress(b'{"a": 1}'), {}, ["int64"], [[1]]),
    "zstd": ("a.csv.zst", pa.compress(b"a\n1\n", "zstd", asbytes=True), {}, ["string"], [["1"]]),
    "named types": ("a.csv", 'l,s,d,b\n"[1, null]","{""a"": null}",1.50,aGk=\n',
                    {"types": "l=list<int64>,s=struct<a: string>,d=decimal128(5, 2),b=binary"},
                    ["list<element: int64>", "struct<a: string>", "decimal128(5, 2)", "binary"], None),
}  # fmt: skip
KEPT["quotes that are doubled"] = ("a.csv", 'a,b\n"""",""\n""",",\n', {}, TEXTS, [['"', ""], ['",', None]])


@pytest.mark.parametrize("name", KEPT)
def test_convert_keeps_every_value_as_it_is(tmp_path, name):
    file, content, options, types, rows = KEPT[name]
    found_types, found_rows = converted(tmp_path, file, content, **options)
    assert found_types == types
    assert rows is None or found_rows == rows


REFUSED = {
    "latin-1": ("a.csv", "a,b\nx,y\nx,SECRET\xe9".encode("latin-1"), {}, r"a\.csv:3: got a byte .*--encoding latin-1"),
    "latin-1 in JSON": ("a.jsonl", '{"a": 1}\n{"a": "\xe9"}'.encode("latin-1"), {}, r"a\.jsonl:2: got a byte"),
    "UTF-16": ("a.jsonl", '{"a": 1}'.encode("utf-16"), {}, r"a\.jsonl:1: .*--encoding utf-16"),
    "repeated names": ("a.csv", "a,b,a\n1,2,3\n", {}, r"a\.csv:1: got more than one column 'a'"),
    "a ragged line after a line break": ("a.csv", 'a,b\n"x\ny",1\nSECRET\n', {}, r"a\.csv:4: got 1 field, wanted 2"),
    "an open quote": ("a.csv", 'a,b\n1,2\n"SECRET,2\n\n3,4\n', {}, r"a\.csv:3: .*a quote that is not closed"),
    "text after a quote": ("a.csv", 'a,b\n"SECRET"x,2\n', {}, r"a\.csv:2: got a record that is not CSV"),
    "old Mac line ends": ("a.csv", "a,b\r1,SECRET\r", {}, r"a\.csv:1: .*carriage return"),
    "semicolons": ("a.csv", "a;b\n1;2\n", {}, r"a\.csv:1: .*--delimiter ';'"),
    "no line": ("a.csv", "", {}, r"a\.csv: got no line"),
    "a delimiter of two": ("a.csv", "a", {"delimiter": "::"}, r"--delimiter: got '::'"),
    "an unknown encoding": ("a.csv", "a", {"encoding": "latin-99"}, r"--encoding: got 'latin-99'"),
    "a column that is not there": ("a.csv", "id\n1\n", {"types": "ids=int64"}, r"--types: got column 'ids', .*'id'"),
    "an unknown type": ("a.csv", "a\n1\n", {"types": "a=integr"}, r"--types: got 'a=integr', wanted COLUMN=TYPE"),
    "no type": ("a.csv", "a\n1\n", {"types": "a"}, r"--types: got 'a', wanted COLUMN=TYPE"),
    "a text that is no number": ("a.csv", "a\n1\n\nSECRET\n", {"types": "a=int64"}, r"a\.csv:4: .*got a text"),
    "a number that is too large": ("a.csv", "a\n1\n300\n", {"types": "a=int8"}, r"a\.csv:3: column 'a': .*beyond int8"),
    "a time without its zone": ("a.csv", "a\n2024-01-02\n", {"types": "a=timestamp[us, tz=UTC]"}, "an offset or Z"),
    "digits that would be lost": ("a.csv", "a\n1.234\n", {"types": "a=decimal128(5, 2)"}, r"a\.csv:2: .*more digits"),
    "mixed types": ("a.jsonl", '\n{"a": 1}\n{"a": "SECRET"}', {}, r"a\.jsonl:3: column 'a': got a text, "
                    r"wanted an integer, as in .*a\.jsonl:2 \(--types a=json"),
    "mixed types inside": ("a.jsonl", '{"m": [{"c": "x"}]}\n{"m": [{"c": ["SECRET"]}]}', {},
                           r"a\.jsonl:2: column 'm\[\]\.c': got a list, wanted a text"),
    "a boolean among numbers": ("a.jsonl", '{"a": 1}\n{"a": true}', {}, r"a\.jsonl:2: .*a boolean, wanted an integer"),
    "a huge integer": ("a.jsonl", '{"a": 1}\n{"a": 18446744073709551616}', {}, r"a\.jsonl:2: .*beyond int64"),
    "unsigned and negative": ("a.jsonl", '{"a": -1}\n{"a": 18446744073709551615}', {}, r"a\.jsonl:2: .*beyond int64"),
    "an integer that a double rounds": ("a.jsonl", '{"a": 0.5}\n{"a": 9007199254740993}', {},
                                        r"a\.jsonl:2: .*2\*\*53 among .*--types a=string"),
    "a number beyond double": ("a.jsonl", '{"a": 1e400}', {}, r"a\.jsonl:1: .*beyond the range of double"),
    "empty objects": ("a.jsonl", '{"metadata": {}}', {}, r"a\.jsonl:1: column 'metadata': got only empty objects"),
    "empty objects inside": ("a.jsonl", '{"m": [{"k": {}}]}', {}, r"column 'm\[\]\.k': .*--types m=json"),
    "a key twice": ("a.jsonl", '{"a": 1, "a": 2}', {}, r"a\.jsonl:1: got an object that has a key twice"),
    "half a surrogate pair": ("a.jsonl", '{"a": "x"}\n{"a": "\\ud800"}', {}, r"a\.jsonl:2: .*half of a surrogate pair"),
    "a line far down": ("a.jsonl", '{"a": "x"}\n' * 40_000 + '{"a": SECRET', {}, r"a\.jsonl:40001: got no JSON"),
    "no object": ("a.jsonl", '{"a": 1}\n"SECRET"', {}, r"a\.jsonl:2: got a text, wanted JSON Lines"),
    "too deep": ("a.jsonl", '{"a": ' + "[" * 100_000, {}, r"a\.jsonl:1: .*nested too deeply"),
    "too many digits": ("a.jsonl", f'{{"a": {"9" * 5000}}}', {}, r"a\.jsonl:1: .*4,300 digits"),
    "an object over several lines": ("a.json", '{\n "a": 1\n}', {}, r"a\.json:1: got no JSON"),
    "a bad object of an array": ("a.json", '[{"a": 1},\n{"a": 2},\n{"a": SECRET}]', {}, r"a\.json:3: got no JSON"),
    "an array of numbers": ("a.json", "[\n1]", {}, r"a\.json:2: got an integer, wanted JSON Lines"),
    "text after an array": ("a.json", '[{"a": 1}]\nSECRET', {}, r"a\.json:1: got something after the array"),
    "an array that does not end": ("a.json", '[{"a": 1}', {}, r"a\.json:1: got something else after an object"),
    "nothing in an array": ("a.json", "[]", {}, "no key in any row"),
    "inference of JSON": ("a.jsonl", '{"a": 1}', {"infer": True}, "--infer: got JSON"),
    "data as keys": ("a.jsonl", json.dumps({"a": {str(n): n for n in range(10_001)}}), {}, r"10,000 different keys"),
    "a gzip file that is cut off": ("a.csv.gz", gzip.compress(b"a\n" * 999)[:-9], {}, r"a\.csv\.gz: got Truncated"),
    "what is no gzip file": ("a.csv.gz", b"a\n1\n", {}, r"a\.csv\.gz: got .*wanted a file that can be read"),
    "Parquet": ("a.parquet", b"PAR1", {}, r"a\.parquet', wanted files that end in .*need no conversion"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_convert_refuses_by_file_and_line_and_leaves_nothing(tmp_path, name):
    file, content, options, message = REFUSED[name]
    with pytest.raises(JobRefused, match=message) as refused:
        converted(tmp_path, file, content, **options)
    assert "SECRET" not in str(refused.value)
    assert not (tmp_path / "data").exists()


def test_convert_of_a_file_that_is_not_there_names_the_nearest(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}')
    code, _, err = segue("convert", tmp_path / "row.jsonl", tmp_path / "data")
    assert code == 2
    assert "which does not exist" in err
    assert "did you mean 'rows.jsonl'?" in err


def test_convert_prints_what_it_inferred_and_the_types(tmp_path):
    (tmp_path / "a.csv").write_text("n,zip\n1,01234\n")
    code, out, err = segue("convert", tmp_path / "a.csv", tmp_path / "data", "--infer")
    assert code == 0
    assert "inferred: n int64" in err
    assert "n (int64), zip (string)" in err
    assert last_line(out)["types"] == ["int64", "string"]
    code, out, _ = segue(
        "convert", tmp_path / "a.csv", tmp_path / "two", "--types", "n=int32", "--types", "zip=json", "--json"
    )
    assert code == 2  # 01234 is no JSON
    code, out, err = segue("convert", tmp_path / "a.csv", tmp_path / "two", "--types", "n=int32,zip=text", "--json")
    assert (code, err) == (0, "")
    assert last_line(out)["types"] == ["int32", "string"]


def test_options_that_would_be_ignored_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("a\n1\n")
    code, _, err = segue("convert", tmp_path / "a.csv", tmp_path / "data", "--partial")
    assert (code, "--partial" in err) == (2, True)
    code, _, err = segue("convert", tmp_path, tmp_path / "rows.jsonl", "--types", "a=string")
    assert (code, "--types" in err) == (2, True)
