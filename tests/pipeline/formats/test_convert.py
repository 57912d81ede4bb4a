"""JSON Lines, CSV and Hugging Face's datasets to Parquet. Odd files are in `test_convert_edges.py`."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commands import segue

from segue.pipeline.formats.convert import to_parquet
from segue.pipeline.problems import JobRefused

ROWS = [{"prompt": f'text {n}, with "quotes"\nand lines é', "n": n, "tags": [str(n)] * (n % 3)} for n in range(25)]


def read(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_convert_json_lines_keeps_every_row_in_order(tmp_path):
    for name, rows in (("a.jsonl", ROWS[:10]), ("b.jsonl", ROWS[10:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = to_parquet(str(tmp_path / "*.jsonl"), str(tmp_path / "data"), rows_per_file=8)
    assert (found.num_rows, found.num_files, found.columns) == (25, 4, ("prompt", "n", "tags"))
    assert read(tmp_path / "data") == ROWS
    code, out, _ = segue("convert", tmp_path / "a.jsonl", tmp_path / "again")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["num_rows"] == 10


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_convert_csv_keeps_quotes_and_lines_in_values(tmp_path, name, delimiter):
    with (tmp_path / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "n"], delimiter=delimiter, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(ROWS)
    to_parquet(str(tmp_path / name), str(tmp_path / "data"), rows_per_file=100)
    assert read(tmp_path / "data") == [{"prompt": row["prompt"], "n": str(row["n"])} for row in ROWS]


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": SECRET\n', "a.jsonl:2"),
        ("a.jsonl", '{"a": 1}\n{"a": "SECRET"}\n', "a.jsonl:2"),
        ("a.csv", "a,b\n1,2\n1,2,SECRET\n", "a.csv:3"),
        ("a.txt", "a", "a.txt"),
    ],
)
def test_convert_of_a_bad_line_names_the_file_and_leaves_nothing(tmp_path, name, text, where):
    (tmp_path / name).write_text(text)
    with pytest.raises(JobRefused) as refused:
        to_parquet(str(tmp_path / name), str(tmp_path / "data"), rows_per_file=10)
    assert where in str(refused.value)
    assert "SECRET" not in str(refused.value)
    assert not (tmp_path / "data").exists()


def test_convert_into_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    code, _, err = segue("convert", tmp_path / "a.jsonl", tmp_path)
    assert code == 2
    assert "an empty one" in err
    assert to_parquet.__doc__


def test_convert_of_json_files_of_which_one_lacks_a_key_makes_nulls_and_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1, "c": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"b": "x", "c": 2}\n')
    found = to_parquet(str(tmp_path), str(tmp_path / "data"), rows_per_file=10)
    assert read(tmp_path / "data") == [{"a": 1, "c": 1, "b": None}, {"a": None, "c": 2, "b": "x"}]
    assert [note.split(": null")[0].partition("/b.jsonl")[2] for note in found.notes] == ["", " has no 'a'"]


def test_convert_of_csv_files_that_differ_in_columns_is_refused_by_name(tmp_path):
    (tmp_path / "a.csv").write_text("a,c\n1,2\n")
    (tmp_path / "b.csv").write_text("c,a\n2,1\n")
    to_parquet(str(tmp_path), str(tmp_path / "data"), rows_per_file=10)
    assert read(tmp_path / "data") == [{"a": "1", "c": "2"}] * 2
    (tmp_path / "c.csv").write_text("a,b\n1,2\n")
    with pytest.raises(JobRefused, match=r"c.csv:1: got a first line that lacks 'c', has 'b'"):
        to_parquet(str(tmp_path), str(tmp_path / "other"), rows_per_file=10)


def test_convert_a_dataset_of_huggingfaces_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    to_parquet(str(tmp_path / "saved"), str(tmp_path / "data"), rows_per_file=10)
    assert read(tmp_path / "data") == ROWS
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(JobRefused, match="splits/train"):
        to_parquet(str(tmp_path / "splits"), str(tmp_path / "other"), rows_per_file=10)


def test_convert_an_empty_saved_dataset_makes_a_file_without_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"a": datasets.Value("string"), "n": [datasets.Value("int64")]})
    datasets.Dataset.from_dict({"a": [], "n": []}, features=features).save_to_disk(tmp_path / "saved")
    found = to_parquet(str(tmp_path / "saved"), str(tmp_path / "data"), rows_per_file=10)
    assert (found.num_rows, found.num_files, found.columns) == (0, 1, ("a", "n"))
    assert read(tmp_path / "data") == []


@pytest.mark.parametrize("source", ["hf:", "broken"])
def test_convert_a_dataset_that_cannot_be_loaded_is_refused_in_a_line(tmp_path, monkeypatch, source):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    code, _, err = segue("convert", source, tmp_path / "data")
    assert code == 2
    assert "wanted a dataset that Hugging Face's library can load" in err


def test_convert_onto_a_full_disk_exits_5_in_a_line_and_leaves_nothing(tmp_path):
    """The second of two files is larger than a process may write."""
    lines = [json.dumps({"prompt": os.urandom(size).hex()}) for size in (10, 100_000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); from segue.jobs.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "convert", "rows.jsonl", "data", "--rows-per-file", "1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "data cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()
