"""Filters, samples and partition folders: which rows a job is about."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import segue
from echo_jobs import rows_of, write_job
from hypothesis import given
from hypothesis import strategies as st
from ready_jobs import ready_job

from segue.pipeline.dataset.blocks import InputUnreadable
from segue.pipeline.dataset.selection import common_rows, sampled
from segue.pipeline.problems import JobRefused
from segue.pipeline.ready.checks import CheckedJob

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.]")


def write_files(folder: Path, **more: object) -> Path:
    """Three files of ten rows, with a language, a score (null in every fifth row) and a length."""
    (folder / "in").mkdir()
    for number in range(3):
        rows = range(number * 10, number * 10 + 10)
        table = pa.table(
            {
                "prompt": [f"row {n}" for n in rows],
                "lang": ["de" if n % 3 == 0 else "en" for n in rows],
                "score": pa.array([None if n % 5 == 0 else n / 30 for n in rows], pa.float64()),
                "length": pa.array(rows, pa.int32()),
            }
        )
        pq.write_table(table, folder / "in" / f"{number}.parquet", row_group_size=4)
    return folder


def checked(folder: Path, **inputs: object) -> CheckedJob:
    return ready_job(write_job(folder, input={"path": "in", **inputs})).checked


def chosen(job: CheckedJob) -> list[int]:
    """Over all files, numbered through."""
    return [10 * file + int(n) for file, rows in enumerate(job.rows) for n in rows]


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ([["lang", "==", "de"]], [n for n in range(30) if n % 3 == 0]),
        ([["lang", "=", "de"], ["length", ">=", 15]], [n for n in range(15, 30) if n % 3 == 0]),
        ([[["lang", "==", "de"]], [["length", "<", 2]]], [0, 1, *range(3, 30, 3)]),
        ([["score", "==", None]], list(range(0, 30, 5))),
        ([["score", "!=", None], ["score", ">", 0.9]], [28, 29]),
        ([["score", "<=", 1]], [n for n in range(30) if n % 5]),
        ([["length", "in", [3, 17, 99]]], [3, 17]),
        ([["lang", "not in", ["de"]], ["length", "<", 5]], [1, 2, 4]),
        ([["length", ">", 99]], []),
        ([["length", ">=", 0]], list(range(30))),
    ],
)
def test_filters_take_the_rows_for_which_they_hold(tmp_path, filters, wanted):
    assert chosen(checked(write_files(tmp_path), filters=filters)) == wanted


@pytest.mark.parametrize(
    ("values", "filters", "wanted"),
    [
        (pa.array([1, 2**64 - 1, 5], pa.uint64()), [["x", "<", 3]], [0]),
        (pa.array([1, 2**64 - 1, 5], pa.uint64()), [["x", "in", [5, 2**64 - 1]]], [1, 2]),
        (pa.array([0.1, 0.2, None], pa.float32()), [["x", "==", 0.1]], [0]),
        (pa.array([1, 2, 3], pa.int8()), [["x", ">", 1.5]], [1, 2]),
        (pa.array(["2024-01-01", "2025-06-01", None]).cast(pa.date32()), [["x", ">", "2024-12-31"]], [1]),
        (pa.array(["2024-01-01", "2025-06-01", None]).cast(pa.timestamp("us")), [["x", "in", ["2024-01-01"]]], [0]),
        (pa.array([True, False, None]), [["x", "==", False]], [1]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), [["x", "==", "a"]], [0, 2]),
        (pa.array([1, 2, 3]), [["x", "in", []]], []),
        (pa.array([1, 2, 3]), [["x", "not in", []]], [0, 1, 2]),
    ],
    ids=[
        "uint64",
        "uint64-in",
        "float32",
        "between",
        "date",
        "timestamp",
        "bool",
        "dictionary",
        "in-none",
        "not-in-none",
    ],
)
def test_values_are_compared_in_the_columns_own_type(tmp_path, values, filters, wanted):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["p"] * len(values), "x": values}), tmp_path / "in" / "a.parquet")
    assert chosen(checked(tmp_path, filters=filters)) == wanted


def test_filter_does_not_need_more_than_the_lowest_limits(tmp_path):
    write_files(tmp_path)
    limits = {"row_memory_bytes": 64 * 2**20, "row_cpu_s": 1}
    job = write_job(tmp_path, input={"path": "in", "filters": [["lang", "==", "de"]]}, limits=limits)
    assert len(chosen(ready_job(job).checked)) == 10


@pytest.mark.parametrize("use_dictionary", [False, True], ids=["footer-says-how-much", "footer-says-little"])
def test_filter_on_large_texts_reads_few_at_a_time(tmp_path, use_dictionary):
    """300 MB of texts in one row group, and 128 MB to read them with."""
    (tmp_path / "in").mkdir()
    texts = [None if n % 100 == 0 else "x" * 25_000 for n in range(12_000)]
    table = pa.table({"prompt": ["x"] * 12_000, "text": texts, "n": range(12_000)})
    pq.write_table(table, tmp_path / "in" / "0.parquet", use_dictionary=use_dictionary, compression="zstd")
    limits = {"row_memory_bytes": 128 * 2**20}
    for filters in ([["text", "==", None]], [["text", "!=", None], ["n", "<", 3]]):
        job = write_job(tmp_path, input={"path": "in", "filters": filters}, limits=limits)
        wanted = list(range(0, 12_000, 100)) if len(filters) == 1 else [1, 2]
        assert chosen(ready_job(job).checked) == wanted


def test_filter_on_one_text_larger_than_memory_is_refused_with_its_file_and_row(tmp_path):
    (tmp_path / "in").mkdir()
    table = pa.table({"prompt": ["x"] * 200, "text": ["x"] * 100 + ["y" * 2**27] + ["x"] * 99})
    pq.write_table(table, tmp_path / "in" / "0.parquet", compression="zstd")
    inputs = {"path": "in", "filters": [["text", "==", None]]}
    with pytest.raises(JobRefused, match=r"ended its process \(memory\), behind row 0 of '.*0\.parquet'"):
        ready_job(write_job(tmp_path, input=inputs, limits={"row_memory_bytes": 64 * 2**20}))


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_filter_on_texts_of_any_type(tmp_path, kind):
    (tmp_path / "in").mkdir()
    table = pa.table({"prompt": ["x"] * 3, "text": pa.array(["a", None, "b"]).cast(kind)})
    pq.write_table(table, tmp_path / "in" / "0.parquet")
    assert chosen(checked(tmp_path, filters=[["text", "==", "b"]])) == [2]
    assert chosen(checked(tmp_path, filters=[["text", "!=", None]])) == [0, 2]


def test_limit_comes_after_sample_and_sample_after_filters(tmp_path):
    write_files(tmp_path)
    filtered = set(chosen(checked(tmp_path, filters=[["lang", "==", "en"]])))
    some = chosen(checked(tmp_path, filters=[["lang", "==", "en"]], sample=6))
    assert len(some) == 6
    assert set(some) < filtered
    assert chosen(checked(tmp_path, filters=[["lang", "==", "en"]], sample=6, limit=2)) == some[:2]


def test_sample_is_of_its_size_and_differs_by_seed(tmp_path):
    write_files(tmp_path)
    half = chosen(checked(tmp_path, sample=0.5))
    assert len(half) == 15
    assert half == chosen(checked(tmp_path, sample=0.5))
    assert half != chosen(ready_job(write_job(tmp_path, seed=1, input={"path": "in", "sample": 0.5})).checked)
    assert len(chosen(checked(tmp_path, sample=99))) == 30
    assert len(chosen(checked(tmp_path, sample=0.001))) == 1


@given(
    sizes=st.lists(st.integers(0, 40), max_size=6),
    wanted=st.integers(1, 60) | st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63 - 1),
    steps=st.integers(1, 3),
)
def test_samples_are_rows_once_each_in_order_and_of_the_asked_number(sizes, wanted, seed, steps):
    rows = [range(size) if steps == 1 else np.arange(0, size * steps, steps) for size in sizes]
    found = sampled(rows, wanted, seed)
    total = sum(sizes)
    assert sum(map(len, found)) == min(total, wanted if isinstance(wanted, int) else max(1, round(wanted * total)))
    for some, all_ in zip(found, rows, strict=True):
        assert list(some) == sorted(set(some))
        assert set(some) <= set(all_)


def test_sample_is_spread_evenly_and_is_what_it_was_in_every_version():
    (found,) = sampled([range(100_000)], 10_000, 7)
    parts = np.histogram(found, bins=10, range=(0, 100_000))[0]
    assert parts.min() > 900
    assert parts.max() < 1100
    assert [int(n) for n in sampled([range(1000)], 5, 0)[0]] == [253, 365, 409, 502, 820]


@given(one=st.sets(st.integers(0, 30)), start=st.integers(0, 30), stop=st.integers(0, 30))
def test_common_rows_are_the_intersection(one, start, stop):
    numbers = np.array(sorted(one), np.int64)
    assert list(common_rows(numbers, range(start, stop))) == sorted(one & set(range(start, stop)))
    assert list(common_rows(range(5, 20), range(start, stop))) == sorted(set(range(5, 20)) & set(range(start, stop)))


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ([["langg", "==", "de"]], "input.filters: got 'langg', which is not, or twice, in"),
        ([["lang", "==", 3]], "input.filters: got what its columns cannot be compared with"),
        ([["lang", "==", True]], "input.filters: got what its columns cannot be compared with"),
        ([["length", "==", 2**70]], "input.filters: got what its columns cannot be compared with"),
        ([["length", "in", [2**70]]], "input.filters: got what its columns cannot be compared with"),
        ([["length", "==", "3"]], "input.filters: got what its columns cannot be compared with"),
        ([["lang", "~", "de"]], "got '~', wanted '=', '=='"),
        ([["lang", "in", "de"]], "a list of values after in and not in"),
        ([["lang", "==", ["de"]]], "a list of values after in and not in"),
        ([["lang", "<", None]], "null after = and != only"),
        ([["", "==", "de"]], "a column's name first"),
        ([], "input.filters"),
        ("lang == de", "input.filters"),
    ],
)
def test_filter_that_makes_no_sense_is_refused_by_its_key(tmp_path, filters, said):
    with pytest.raises(JobRefused, match=re.escape(said)):
        checked(write_files(tmp_path), filters=filters)


def test_filter_over_a_page_that_cannot_be_decoded_names_the_file(tmp_path):
    """Whether its rows are wanted cannot be told."""
    write_files(tmp_path)
    path = tmp_path / "in" / "1.parquet"
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    raw = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    raw[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(raw)
    with pytest.raises(InputUnreadable, match=re.escape("1.parquet")):
        checked(tmp_path, filters=[["lang", "==", "de"]])


def partitioned(folder: Path, *places: str) -> Path:
    for number, place in enumerate(places):
        (folder / "in" / place).mkdir(parents=True)
        table = pa.table({"prompt": [f"{number}-{n}" for n in range(4)]})
        pq.write_table(table, folder / "in" / place / "part.parquet")
    return folder


def test_partition_folders_are_columns_that_can_be_used_like_any(here, tmp_path):
    partitioned(tmp_path, "lang=de/year=2024", "lang=de/year=2025", "lang=a%20b/year=2025")
    job = write_job(
        tmp_path,
        input={"path": "in", "filters": [["year", "==", 2025]]},
        prompt={"format": "text", "text": "{lang} {year} {prompt}"},
        sampling_params={"max_tokens": 50},
    )
    code, out, err = segue("run", job, "--quiet")
    assert code == 0, err
    rows = list(rows_of(tmp_path / "out").values())
    assert sorted(row["generated_text"] for row in rows) == sorted(
        [f"a b 2025 2-{n}" for n in range(4)] + [f"de 2025 1-{n}" for n in range(4)]
    )
    assert {(row["lang"], row["year"]) for row in rows} == {("de", 2025), ("a b", 2025)}
    assert json.loads(out.splitlines()[-1])["rows"] == 8


def test_partition_values_are_numbers_only_if_all_are_and_null_by_hives_name(tmp_path):
    job = checked(partitioned(tmp_path, "a=1/b=1", "a=x/b=__HIVE_DEFAULT_PARTITION__", "a=007/b=2"))
    assert job.columns.schema.field("a").type == pa.string()
    assert job.columns.schema.field("b").type == pa.int64()
    assert [dict(file.partition)["b"].as_py() for file in job.inputs] == [2, 1, None]


def test_column_of_a_file_wins_over_its_folders_name(tmp_path):
    (tmp_path / "in" / "prompt=folder").mkdir(parents=True)
    pq.write_table(pa.table({"prompt": ["own"]}), tmp_path / "in" / "prompt=folder" / "a.parquet")
    assert checked(tmp_path).inputs[0].partition == ()


def test_file_without_such_a_folder_has_null(tmp_path):
    job = checked(partitioned(tmp_path, "lang=de", "year=2025", "plain"))
    found = {file.src_path: {key: value.as_py() for key, value in file.partition} for file in job.inputs}
    assert found == {
        "lang=de/part.parquet": {"lang": "de", "year": None},
        "plain/part.parquet": {"lang": None, "year": None},
        "year=2025/part.parquet": {"lang": None, "year": 2025},
    }


def test_retry_answers_only_failed_rows_that_the_filters_took(here, tmp_path):
    write_files(tmp_path)
    table = pa.table({"prompt": ["x", None, "y", None], "lang": ["de", "de", "en", "en"]})
    (tmp_path / "in2").mkdir()
    pq.write_table(table, tmp_path / "in2" / "a.parquet")
    job = write_job(tmp_path, input={"path": "in2", "filters": [["lang", "==", "de"]]}, limits={"max_error_rate": 1.0})
    code, _, err = segue("run", job, "--quiet")
    assert code == 0, err
    code, _, err = segue("retry", tmp_path / "out", "--output", tmp_path / "again", "--quiet", "--set", "seed=5")
    assert code == 0, err
    assert rows_of(tmp_path / "again").keys() == {("a.parquet", 1)}


def test_retry_of_a_sample_finds_its_rows_whatever_the_seed_and_the_limit(here, tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": pa.array([None] * 90, pa.string())}), tmp_path / "in" / "a.parquet")
    inputs = {"path": "in", "sample": 2, "limit": 1}
    code, _, err = segue("run", write_job(tmp_path, input=inputs, limits={"max_error_rate": 1.0}), "--quiet")
    assert code == 0, err
    code, _, err = segue("retry", tmp_path / "out", "--output", tmp_path / "again", "--quiet", "--set", "seed=5")
    assert code == 0, err
    assert rows_of(tmp_path / "again").keys() == rows_of(tmp_path / "out").keys()
    assert ("a.parquet", 0) not in rows_of(tmp_path / "again")


def test_filter_that_takes_nothing_completes_an_empty_output(here, tmp_path):
    write_files(tmp_path)
    job = write_job(tmp_path, input={"path": "in", "filters": [["length", ">", 99]], "sample": 0.5})
    code, out, err = segue("run", job, "--quiet")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["rows"] == 0
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_more_partition_keys_than_anybody_has_are_refused(tmp_path):
    with pytest.raises(JobRefused, match="folders key=value with 101 keys"):
        checked(partitioned(tmp_path, *(f"k{n}=1" for n in range(101))))


def test_sample_on_the_command_line(tmp_path):
    write_files(tmp_path)
    code, out, err = segue("validate", write_job(tmp_path, input={"path": "in"}), "--sample", "0.2")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["rows"] == 6
