"""Random tables through CSV and JSON Lines and back: equal, or refused with the reason."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hand_made_outputs import output_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segue.pipeline.formats.column_types import parse_types
from segue.pipeline.formats.convert import Converted, ReadOptions, to_parquet
from segue.pipeline.formats.export import from_output
from segue.pipeline.problems import JobRefused

pytestmark = pytest.mark.fuzz
EXAMPLES = settings(
    max_examples=min(1000, settings().max_examples // 2),  # 50; with SEGUE_HYPOTHESIS=fuzz 1,000
    suppress_health_check=[HealthCheck.too_slow],
)
TEXT = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["", "01234", "+491234", "NA", "null", "2024-01-02", "2024-01-02T03:04:05+02:00", "1e400", "true", ' "', '""', "\r",
     "\r\n", "a,b", "\ufeff", "=1+1", "\x00", "\u2028", "-0", "1_000", " 7 "]
)  # fmt: skip
MOMENTS = st.integers(-(2**55), 2**55)


def _ints(kind: pa.DataType) -> st.SearchStrategy[int]:
    low = -(2 ** (kind.bit_width - 1)) if pa.types.is_signed_integer(kind) else 0
    return st.integers(low, low + 2**kind.bit_width - 1)


VALUES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.string(): TEXT,
    pa.bool_(): st.booleans(),
    pa.float64(): st.floats(),
    pa.float32(): st.floats(width=32),
    pa.date32(): st.dates(),
    pa.time64("us"): st.times(),
    pa.timestamp("us"): MOMENTS,
    pa.timestamp("ns"): MOMENTS,
    pa.timestamp("ms", "UTC"): st.integers(-(2**45), 2**45),
    pa.duration("ms"): MOMENTS,
    pa.decimal128(12, 3): st.decimals(-999_999_999, 999_999_999, places=3),
    pa.binary(): st.binary(max_size=8),
    **{kind: _ints(kind) for kind in (pa.int8(), pa.int64(), pa.uint32(), pa.uint64())},
}


@st.composite
def _columns(draw: st.DrawFn) -> tuple[pa.DataType, st.SearchStrategy[Any]]:
    kind = draw(st.sampled_from(list(VALUES)))
    values, shape = st.none() | VALUES[kind], draw(st.sampled_from(["plain", "plain", "list", "struct"]))
    if shape == "list":
        return pa.list_(kind), st.lists(values, max_size=3)
    if shape == "struct":
        fields = pa.struct([pa.field("a", kind), pa.field("b b", pa.list_(pa.string()))])
        return fields, st.fixed_dictionaries({"a": values, "b b": st.none() | st.lists(TEXT, max_size=2)})
    return kind, VALUES[kind]


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    names = draw(st.lists(st.sampled_from(["n", "a b", 'q"', "ä,", "x\ny", "1"]), min_size=1, max_size=4, unique=True))
    num_rows = draw(st.integers(1, 5))
    columns = {}
    for name in names:
        kind, values = draw(_columns())
        drawn = draw(st.lists(st.none() | values, min_size=num_rows, max_size=num_rows))
        columns[name] = pa.array(drawn, kind)
    return pa.table(columns)


def converted(source: Path, folder: Path, options: ReadOptions) -> tuple[Converted, pa.Table]:
    found = to_parquet(str(source), str(folder), 3, options)
    return found, pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))


def as_json_holds(value: Any) -> Any:
    """What is said to be null in JSON Lines."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [as_json_holds(each) for each in value]
    return {key: as_json_holds(each) for key, each in value.items()} if isinstance(value, dict) else value


@given(tables(), st.sampled_from([".csv", ".tsv", ".jsonl"]), st.randoms())
@EXAMPLES
def test_a_table_written_and_read_with_its_types_is_equal(tmp_path_factory, table, suffix, random):
    folder = tmp_path_factory.mktemp("trip")
    order = list(range(table.num_rows))
    random.shuffle(order)
    half = len(order) // 2
    shards = [table.take(pa.array(part, pa.int64())) for part in (order[:half], order[half:])]
    out = output_of(folder, shards, rows=[order[:half], order[half:]])
    target = folder / f"rows{suffix}"
    exported = from_output(str(out), str(target))
    names, written = tuple(table.column_names), ",".join(f"c{n}={field.type}" for n, field in enumerate(table.schema))
    types = dict(zip(names, parse_types([written]).values(), strict=True))
    found, back = converted(target, folder / "data", ReadOptions(types=types))
    assert found.num_rows == table.num_rows
    back = back.select(list(names))
    assert back.schema.types == table.schema.types
    rows = table.to_pylist()
    wanted = [as_json_holds(row) for row in rows] if suffix == ".jsonl" else rows
    assert repr(back.to_pylist()) == repr(wanted)  # NaN is not equal to NaN, but written like it
    assert (exported.num_changed > 0) == (repr(wanted) != repr(rows))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(-9, 9) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "ä"]), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(st.sampled_from(["x", "y", "z"]), JSON, max_size=3), min_size=1, max_size=5)
LIKELY = st.lists(
    st.fixed_dictionaries({"x": TEXT, "y": st.integers(), "z": st.lists(st.floats())}), min_size=1, max_size=5
)


def _check_reason(message: str) -> None:
    assert "a.json:" in message or "no key in any row" in message


def without_nulls(value: Any) -> Any:
    """A key that an object lacks is null in a table."""
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return value


def kept(value: Any) -> Any:
    """For comparisons: integers among numbers with a fraction are doubles, objects have their keys in any order."""
    if isinstance(value, dict):
        return {key: kept(each) for key, each in sorted(value.items())}
    if isinstance(value, list):
        return [kept(each) for each in value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return repr(float(value)) if is_number and abs(value) <= 2**53 else repr(value)


@given(OBJECTS | LIKELY, st.booleans())
@EXAMPLES
def test_any_objects_as_json_are_equal_or_refused_by_file_line_and_column(tmp_path_factory, rows, is_array):
    folder = tmp_path_factory.mktemp("json")
    text = json.dumps(rows, indent=1) if is_array else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "a.json").write_text(text)
    try:
        _, back = converted(folder / "a.json", folder / "data", ReadOptions())
    except JobRefused as refused:
        assert not (folder / "data").exists()
        _check_reason(str(refused))
    else:
        assert kept(without_nulls(back.to_pylist())) == kept(without_nulls(rows))
    if columns := {key for row in rows for key in row}:  # as JSON text nothing is refused
        options = ReadOptions(types=parse_types([f"{key}=json" for key in columns]))
        _, back = converted(folder / "a.json", folder / "text", options)
        texts = [{key: json.loads(text) for key, text in row.items() if text is not None} for row in back.to_pylist()]
        wanted = [{key: row[key] for key in columns if row.get(key) is not None} for row in rows]
        assert [sorted(map(repr, row.items())) for row in texts] == [sorted(map(repr, row.items())) for row in wanted]


@given(
    st.lists(st.sampled_from(["a", "b c", 'd"', "e,", "f\n"]), min_size=1, max_size=4, unique=True),
    st.data(),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@EXAMPLES
def test_any_texts_as_csv_stay_as_they_are(tmp_path_factory, names, data, quoting):
    folder = tmp_path_factory.mktemp("csv")
    rows = data.draw(st.lists(st.lists(TEXT, min_size=len(names), max_size=len(names)), max_size=5))
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=quoting).writerows([names, *rows])
    found, back = converted(folder / "a.csv", folder / "data", ReadOptions())
    is_bare = quoting == csv.QUOTE_MINIMAL and len(names) > 1  # nothing, instead of an empty text
    assert set(found.types) == {"string"}
    assert [list(row.values()) for row in back.to_pylist()] == [
        [text or (None if is_bare else "") for text in row] for row in rows
    ]
