"""Output folders to JSON Lines and CSV: every row, in the input's order, whatever one value is."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import last_line, segue
from hand_made_outputs import output_of

from segue.pipeline.formats.export import from_output
from segue.pipeline.problems import JobRefused

NOTES = pa.table({"note": ["x,\n", None, "y", "", '"z"']})


def objects(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def left_overs(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix in (".part", ".waiting")]


def test_export_stands_in_the_order_of_the_input(tmp_path):
    out = output_of(tmp_path, [NOTES, NOTES], rows=[[7, 3, 9, 0, 5], [2, 8, 1, 6, 4]])
    found = from_output(str(out), str(tmp_path / "rows.jsonl"))
    rows = objects(tmp_path / "rows.jsonl")
    assert [row["src_row"] for row in rows] == list(range(10))
    assert [row["generated_text"] for row in rows] == [f"answer {n}" for n in range(10)]
    assert (found.num_rows, found.is_complete, found.num_missing, found.num_changed) == (10, True, 0, 0)
    table = pa.concat_tables(pq.read_table(path) for path in out.glob("part-*.parquet"))
    assert rows == sorted(table.to_pylist(), key=lambda row: row["src_row"])


@pytest.mark.parametrize(("name", "delimiter"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_export_to_csv_tells_null_from_an_empty_text(tmp_path, name, delimiter):
    out = output_of(tmp_path, [NOTES], rows=[[0, 1, 2, 3, 4]])
    code, _, _ = segue("convert", out, tmp_path / name)
    assert code == 0
    text = (tmp_path / name).read_bytes().decode()
    assert text.split("\r\n")[2].startswith(delimiter + "a" + delimiter)
    assert text.split("\r\n")[4].startswith(f'""{delimiter}a')
    with (tmp_path / name).open(newline="") as file:
        assert [row["note"] for row in csv.DictReader(file, delimiter=delimiter)] == ["x,\n", "", "y", "", '"z"']


ODD = pa.table(
    {
        "text": pa.array([b"a\xff", b"b"], pa.binary()).view(pa.string()),
        "inside": pa.array([[{"k": "x"}], None], pa.list_(pa.struct([("k", pa.string())]))),
        "late": pa.array([9 * 10**17, 0], pa.timestamp("us")),
        "never": pa.array([2**62, 0], pa.timestamp("ms")),
        "nano": pa.array([1, 1_500_000_000], pa.timestamp("ns")),
        "zoned": pa.array([0, 2**59], pa.timestamp("us", "Europe/Berlin")),
        "day": pa.array([10**7, 0], pa.int32()).cast(pa.date32()),
        "clock": pa.array([1, 0], pa.time64("ns")),
        "span": pa.array([2**62, 0], pa.duration("s")),
        "huge": pa.array([2**64 - 1, 0], pa.uint64()),
        "x": pa.array([float("nan"), 0.1]),
        "half": pa.array([[float("inf")], [1.5]], pa.list_(pa.float16())),
        "raw": pa.array([b"\x00\xff", b""], pa.binary()),
        "money": pa.array([None, "1.50"]).cast(pa.decimal128(9, 2)),
        "kind": pa.array(["a", None]).dictionary_encode(),
        "pairs": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
    }
)
WRITTEN = {
    "text": ["a\ufffd", "b"], "inside": [[{"k": "x"}], None], "late": ["30489-11-11T16:00:00", "1970-01-01T00:00:00"],
    "never": [None, "1970-01-01T00:00:00"], "nano": ["1970-01-01T00:00:00.000000001", "1970-01-01T00:00:01.5"],
    "day": ["29349-01-26", "1970-01-01"], "clock": ["00:00:00.000000001", "00:00:00.000000000"],
    "span": [2**62, 0], "huge": [2**64 - 1, 0], "x": [None, 0.1], "half": [[None], [1.5]], "raw": ["AP8=", ""],
    "money": [None, "1.50"], "kind": ["a", None], "pairs": [[["k", 1]], None],
}  # fmt: skip


def test_export_of_values_that_json_or_python_lacks_costs_the_value_alone(tmp_path):
    out = output_of(tmp_path, [ODD], rows=[[0, 1]])
    code, printed, err = segue("convert", out, tmp_path / "rows.jsonl")
    assert code == 0
    rows = objects(tmp_path / "rows.jsonl")
    assert {name: [row[name] for row in rows] for name in WRITTEN} == WRITTEN
    assert rows[0]["zoned"] == "1970-01-01T01:00:00+0100"
    assert last_line(printed)["num_changed"] == 4  # text, never, x, half
    assert "4 values without a form" in err
    found = from_output(str(out), str(tmp_path / "rows.csv"))
    with (tmp_path / "rows.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["x"], first["raw"], second["raw"], first["pairs"]) == ("nan", "AP8=", "", '[["k", 1]]')
    assert first["half"] == "[Infinity]"
    assert found.num_changed == 2  # CSV has NaN and infinity, and JSON inside it has them as Python writes them


def test_export_of_an_unfinished_output_is_refused_unless_asked_for(tmp_path):
    out = output_of(tmp_path, [NOTES, NOTES], rows=[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], is_finished=False)
    code, printed, err = segue("convert", out, tmp_path / "rows.jsonl")
    assert (code, printed) == (2, "")
    assert "is not finished" in err
    assert "--partial" in err
    assert not (tmp_path / "rows.jsonl").exists()
    code, printed, err = segue("convert", out, tmp_path / "rows.jsonl", "--partial", "--json")
    assert code == 0
    assert "is partial: it lacks 5 planned rows" in err
    said = last_line(printed)
    assert (said["num_rows"], said["is_complete"], said["num_missing"]) == (5, False, 5)
    assert len(objects(tmp_path / "rows.jsonl")) == 5


def test_export_of_an_output_that_lost_a_shard_after_it_was_done_is_no_success(tmp_path):
    out = output_of(tmp_path, [NOTES, NOTES], rows=[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    next(out.glob("part-000001*")).unlink()
    code, _, err = segue("convert", out, tmp_path / "rows.jsonl")
    assert code == 5
    assert "is gone although" in err
    assert not (tmp_path / "rows.jsonl").exists()


def test_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    out = output_of(tmp_path, [NOTES], rows=[[0, 1, 2, 3, 4]])
    shard = next(out.glob("part-*"))
    content = bytearray(shard.read_bytes())
    content[20:60] = b"\xff" * 40
    shard.write_bytes(content)
    code, _, err = segue("convert", out, tmp_path / "rows.jsonl", "--partial")
    assert (code, "cannot be read" in err) == (5, True)
    assert not (tmp_path / "rows.jsonl").exists()
    assert left_overs(tmp_path) == []
    with pytest.raises(JobRefused, match="a file that can be written"):
        from_output(
            str(output_of(tmp_path / "b", [NOTES], rows=[[0, 1, 2, 3, 4]])), str(tmp_path / "no" / "rows.jsonl")
        )


def test_export_names_what_is_no_output_or_no_such_file(tmp_path):
    out = output_of(tmp_path, [NOTES], rows=[[0, 1, 2, 3, 4]])
    code, _, err = segue("convert", out, tmp_path / "rows.json")
    assert code == 2
    assert "a file that ends in .jsonl" in err
    (tmp_path / "a.csv").write_text("a\n1\n")
    code, _, err = segue("convert", tmp_path / "a.csv", tmp_path / "rows.jsonl")
    assert code == 2
    assert "wanted an output folder of Segue, as TARGET is a file" in err
