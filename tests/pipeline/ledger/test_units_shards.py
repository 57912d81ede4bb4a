"""Units of the plan and shards of the output: what goes in comes out, and nothing else is taken for it."""

import datetime
import json
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from segue.attention.segments import Segment
from segue.pipeline.ledger.chains import encode_chain
from segue.pipeline.ledger.columns import RESULT_COLUMNS, error_value, result_row, result_schema, result_table
from segue.pipeline.ledger.shards import (
    PROTOCOL,
    ForeignShard,
    ShardDamaged,
    ShardFooter,
    commit_shard,
    read_footer,
    read_shard,
    serialize_shard,
)
from segue.pipeline.ledger.units import (
    PASSED,
    PLANNED_FIELDS,
    UnitDamaged,
    UnitSpec,
    load_unit,
    planned_rows,
    serialize_unit,
)
from segue.pipeline.storage.folder import LocalStore
from segue.pipeline.storage.store import OutputStorageError
from segue.workers.errors import RowError, RowErrorCode
from segue.workers.rows.params import SamplingParams
from segue.workers.rows.request import CompletionOutput, RequestOutput, TokenLogprobs

ERROR = RowError(RowErrorCode.NULL_PROMPT, "the prompt is null")
PASSED_TABLE = pa.table(
    {
        "text": pa.array(["a", None, "\x00\u2603"], pa.large_string()),
        "kind": pa.array(["x", None, "x"], pa.dictionary(pa.int32(), pa.string())),
        "time": pa.array([1, None, -(2**62)], pa.timestamp("ns", "Europe/Zurich")),
        "price": pa.array([Decimal("-1.10"), None, Decimal("99999999.99")], pa.decimal128(10, 2)),
        "list": pa.array([[1, None], [], None], pa.list_(pa.int8())),
        "struct": pa.array([{"a": 1, "b": None}, None, {"a": None, "b": [b"x"]}]).cast(
            pa.struct([("a", pa.uint16()), ("b", pa.large_list(pa.binary()))])
        ),
        "map": pa.array([[("k", 1.5)], None, []], pa.map_(pa.string(), pa.float32())),
        "number": pa.array([float("nan"), -0.0, None], pa.float64()),
        "large": pa.array([2**63 - 1, -(2**63), None]),
        "day": pa.array([datetime.date(1, 1, 1), None, datetime.date(9999, 12, 31)]),
        "fixed": pa.array([b"ab", None, b"cd"], pa.binary(2)),
        "nothing": pa.nulls(3),
    }
)


def bits(table: pa.Table) -> list[Any]:
    """Contents to the bit: NaN equals NaN, and -0.0 is not 0.0."""
    return [(field.name, field.type, repr(table[field.name].to_pylist())) for field in table.schema]


def unit_table(errors: Sequence[RowError | None] = (None, ERROR, None)) -> pa.Table:
    chain = encode_chain((Segment((1, 2), True), Segment((3,), False)))
    columns = {
        "chain": [b"" if error else chain for error in errors],
        "src_path": ["a.parquet"] * len(errors),
        "src_row": list(range(len(errors))),
        "sampling_params": ['{"max_tokens": 3}', None, None][: len(errors)],
        "error": [error and error_value(error) for error in errors],
        "num_truncated_tokens": [None if error else 5 for error in errors],
    }
    arrays = [pa.array(columns[field.name], field.type) for field in PLANNED_FIELDS]
    passed = PASSED_TABLE.slice(0, len(errors))
    names = [*columns, *(PASSED + name for name in passed.column_names)]
    return pa.table([*arrays, *passed.columns], names=names)


def planned(store: LocalStore) -> UnitSpec:
    """A unit that is in the store."""
    unit_id, content = serialize_unit(unit_table(), "f")
    unit = UnitSpec(7, unit_id, 3, 3, 6)
    store.create(unit.unit_name, content)
    return unit


def shard_of(results: Sequence[dict[str, Any]], params: SamplingParams) -> pa.Table:
    origin = [{"src_path": "a.parquet", "src_row": number} | result for number, result in enumerate(results)]
    return result_table(result_schema(PASSED_TABLE.schema, params), PASSED_TABLE, origin)


def footer_of(unit: UnitSpec, **changes: Any) -> ShardFooter:
    values = {"fingerprint": "f", "unit_id": unit.unit_id, "num_rows": 3, "errors": {}} | changes
    return ShardFooter(protocol=PROTOCOL, num_input_tokens=6, num_computed_tokens=4, num_generated_tokens=2, **values)


def answer(num_samples: int = 1, logprobs: bool = False) -> dict[str, Any]:
    token = [TokenLogprobs(9, -0.5, ((9, -0.5), (8, -1.0)))]
    samples = [CompletionOutput(i, f"s{i}", [9], "stop", None, token if logprobs else None) for i in range(num_samples)]
    return result_row(RequestOutput(0, [1, 2, 3], 2, samples))


def test_unit_round_trip_keeps_types_and_values_to_the_bit(tmp_path):
    store = LocalStore(tmp_path)
    loaded = load_unit(store, planned(store))
    assert bits(loaded) == bits(unit_table())


def test_unit_rows_have_segments_parameters_and_errors(tmp_path):
    first, second, third = planned_rows(unit_table(), SamplingParams(max_tokens=5, temperature=0.5))
    assert first.segments == (Segment((1, 2), True), Segment((3,), False))
    assert (first.params.max_tokens, first.params.temperature) == (3, 0.5)
    assert third.params.max_tokens == 5
    assert (first.num_truncated_tokens, second.num_truncated_tokens) == (5, 0)
    assert second.error is not None
    assert (second.error.code, second.error.message, second.segments) == (ERROR.code, ERROR.message, ())
    assert len({row.random_key for row in (first, second, third)}) == 3


@pytest.mark.parametrize(("own", "is_equal"), [({"seed": 7}, True), ({"max_tokens": 3}, False), ({"seed": -1}, False)])
def test_unit_rows_with_a_seed_of_their_own_are_not_named_for_their_draws(own, is_equal):
    table = unit_table((None, None))
    column = pa.array([json.dumps(own)] * 2, pa.string())
    table = table.set_column(table.column_names.index("sampling_params"), "sampling_params", column)
    first, second = planned_rows(table, SamplingParams(seed=5, temperature=1.0))
    assert (first.random_key == second.random_key) == is_equal


def test_unit_id_depends_on_job_and_content_alone():
    assert serialize_unit(unit_table(), "f") == serialize_unit(unit_table(), "f")
    assert serialize_unit(unit_table(), "f")[0] != serialize_unit(unit_table((None, None, ERROR)), "f")[0]
    assert serialize_unit(unit_table(), "f")[0] != serialize_unit(unit_table(), "g")[0]


def test_unit_spec_round_trip_through_json():
    unit = UnitSpec(12, "00ff", 3, 3, 400)
    assert UnitSpec.from_json(unit.to_json()) == unit
    assert unit.shard_name == "part-000012-00ff.parquet"


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_unit_file_that_was_tampered_with_is_refused_by_name(tmp_path, damage):
    store = LocalStore(tmp_path)
    unit = planned(store)
    path = tmp_path / unit.unit_name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-9] if damage == "cut" else content[:50] + bytes([content[50] ^ 1]) + content[51:])
    with pytest.raises(UnitDamaged, match=unit.unit_id):
        load_unit(store, unit)


@pytest.mark.parametrize(
    ("params", "extra"),
    [
        (SamplingParams(), set()),
        (SamplingParams(logprobs=2), {"logprobs"}),
        (SamplingParams(n=2), {"samples"}),
        (SamplingParams(truncate_prompt_tokens=5), {"num_truncated_tokens"}),
        (SamplingParams(n=2, logprobs=0), {"logprobs", "samples"}),
    ],
)
def test_shard_schema_is_the_same_when_all_rows_failed(params, extra):
    failed = shard_of([{"error": error_value(ERROR)}] * 3, params)
    answered = shard_of([answer(params.n, params.logprobs is not None)] * 3, params)
    assert failed.schema == answered.schema
    own = [name for name in failed.column_names if name not in PASSED_TABLE.column_names]
    optional = {"num_truncated_tokens", "logprobs", "reasoning_text", "samples"}
    assert set(own) == set(RESULT_COLUMNS["generate"]) - optional | extra
    assert failed["generated_text"].null_count == 3
    assert answered["error"].null_count == 3


def test_shard_samples_and_logprobs_are_those_of_the_answer():
    row = shard_of([answer(2, True)] * 3, SamplingParams(n=2, logprobs=2)).to_pylist()[0]
    assert [sample["generated_text"] for sample in row["samples"]] == ["s0", "s1"]
    assert row["generated_text"] == "s0"
    assert row["logprobs"] == row["samples"][1]["logprobs"]
    top = [{"token_id": 9, "logprob": -0.5}, {"token_id": 8, "logprob": -1.0}]
    assert row["logprobs"] == [{"token_id": 9, "logprob": -0.5, "top": top}]


def test_shard_commit_passes_columns_through_to_the_bit_for_plain_readers(tmp_path):
    store = LocalStore(tmp_path)
    unit = planned(store)
    shard = shard_of([answer(), {"error": error_value(ERROR)}, answer()], SamplingParams())
    assert commit_shard(store, unit, serialize_shard(shard, footer_of(unit)), "f")
    table = pq.read_table(tmp_path / unit.shard_name)
    assert bits(table.select(PASSED_TABLE.column_names)) == bits(PASSED_TABLE)
    assert table["src_row"].to_pylist() == [0, 1, 2]
    assert read_footer(store, unit, "f") == footer_of(unit)


def test_shard_second_commit_of_a_unit_loses_and_the_first_stays(tmp_path):
    store = LocalStore(tmp_path)
    unit = planned(store)
    first = serialize_shard(shard_of([answer()] * 3, SamplingParams()), footer_of(unit))
    second = serialize_shard(shard_of([{"error": error_value(ERROR)}] * 3, SamplingParams()), footer_of(unit))
    assert commit_shard(store, unit, first, "f")
    assert not commit_shard(store, unit, second, "f")
    assert store.read(unit.shard_name) == first


def test_shard_that_is_short_is_never_serialized(tmp_path):
    unit = planned(LocalStore(tmp_path))
    with pytest.raises(ValueError, match="3 rows, wanted 4"):
        serialize_shard(shard_of([answer()] * 3, SamplingParams()), footer_of(unit, num_rows=4))


@pytest.mark.parametrize("changes", [{"fingerprint": "other"}, {"unit_id": "0" * 16}, {"protocol": PROTOCOL + 1}])
def test_shard_of_another_job_at_its_name_is_foreign(tmp_path, changes):
    store = LocalStore(tmp_path)
    unit = planned(store)
    values = {"protocol": PROTOCOL} | {name: getattr(footer_of(unit), name) for name in ShardFooter.__slots__}
    footer = ShardFooter(**(values | changes))
    shard = shard_of([answer()] * 3, SamplingParams())
    store.create(unit.shard_name, serialize_shard(shard, footer))
    with pytest.raises(ForeignShard, match=unit.shard_name):
        commit_shard(store, unit, serialize_shard(shard, footer_of(unit)), "f")


@pytest.mark.parametrize("content", [b"", b"PAR1 no", b"text"])
def test_shard_that_is_no_shard_is_foreign(tmp_path, content):
    store = LocalStore(tmp_path)
    unit = planned(store)
    store.create(unit.shard_name, content)
    with pytest.raises(ForeignShard, match="not a shard"):
        read_footer(store, unit, "f")


def test_shard_parquet_file_without_our_footer_is_foreign(tmp_path):
    store = LocalStore(tmp_path)
    unit = planned(store)
    pq.write_table(pa.table({"a": [1, 2, 3]}), tmp_path / unit.shard_name)
    with pytest.raises(ForeignShard):
        read_footer(store, unit, "f")


def test_shard_that_cannot_be_opened_is_a_storage_error(tmp_path):
    store = LocalStore(tmp_path)
    unit = planned(store)
    (tmp_path / unit.shard_name).mkdir()
    with pytest.raises(OutputStorageError, match=unit.shard_name):
        read_footer(store, unit, "f")


class FlippingStore(LocalStore):
    """Whose first reads come with a byte that is not what was written, `at` of the file's length."""

    def __init__(self, root: Path, times: int, at: float = 0.3) -> None:
        super().__init__(root)
        self.times, self.at = times, at

    def read(self, name: str) -> bytes:
        content = bytearray(super().read(name))
        if self.times:
            self.times -= 1
            content[int(len(content) * self.at)] ^= 1
        return bytes(content)


def test_unit_byte_that_flips_on_the_way_is_read_again(tmp_path):
    unit = planned(LocalStore(tmp_path))
    assert bits(load_unit(FlippingStore(tmp_path, 2), unit)) == bits(unit_table())
    with pytest.raises(UnitDamaged, match=unit.unit_name):
        load_unit(FlippingStore(tmp_path, 3), unit)


@pytest.mark.parametrize("where", ["page", "footer"])
def test_shard_byte_that_flips_on_the_way_is_read_again_and_never_hashed(tmp_path, where):
    store = LocalStore(tmp_path)
    unit = planned(store)
    content = serialize_shard(shard_of([answer()] * 3, SamplingParams()), footer_of(unit))
    commit_shard(store, unit, content, "f")
    chunk = pq.read_metadata(tmp_path / unit.shard_name).row_group(0).column(0)
    last_of_page = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 0.5
    at = last_of_page / len(content) if where == "page" else 0.95
    assert read_shard(FlippingStore(tmp_path, 2, at), unit, "f") == (footer_of(unit), content)
    with pytest.raises((ShardDamaged, ForeignShard), match=unit.shard_name):
        read_shard(FlippingStore(tmp_path, 3, at), unit, "f")
