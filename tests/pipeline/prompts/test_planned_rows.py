"""Rows made ready in a child process: ordinary ones come out as in process, hostile ones cost themselves."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_proxy import Fault
from render_specs import LOOPS, TEXT, render_spec

from segue.pipeline.dataset import blocks
from segue.pipeline.dataset.blocks import InputChanged, InputUnreadable, block_of
from segue.pipeline.dataset.files import discover
from segue.pipeline.processes import limited
from segue.pipeline.processes.limited import ChildDied
from segue.pipeline.prompts import rows as planned_rows
from segue.pipeline.prompts.render import RenderSpec, planned_schema, render_block
from segue.pipeline.prompts.rows import PlannedRowReader, PreparationFailed, RowLimits
from segue.workers.prompts.template import PromptTemplate

MIB = 2**20
LIMITS = RowLimits(seconds=1.5, memory_bytes=256 * MIB)
BOMBS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
    "{% if 'LOOP' in m['content'] %}" + LOOPS + "{% endif %}"
    "{% if 'WIDE' in m['content'] %}{{ '{:>9000000000}'.format(1) }}{% endif %}"
    "{% if 'LONG' in m['content'] %}{{ 'a' * 9000000000 }}{% endif %}"
    "{% endfor %}"
)
BOMB_CHAT = PromptTemplate(chat_template=BOMBS)


@pytest.fixture(autouse=True)
def _no_child_is_left():
    yield
    for *_, child in planned_rows._kept:
        child.close()
    planned_rows._kept.clear()


def read(
    path: Path, spec: RenderSpec | None = None, limits: RowLimits = LIMITS, columns: pa.Schema | None = None
) -> list[dict[str, Any]]:
    """All rows of a file as its read tasks give them, which are in order and of the right schema."""
    (file,) = discover([str(path)])
    spec = spec or render_spec()
    columns = columns or pa.schema([file.schema.field(name) for name in ("prompt", *spec.passed_columns)])
    tables = list(PlannedRowReader(columns, spec, limits).read(file, 0, file.num_rows, range(file.num_rows)))
    assert all(table.schema.equals(planned_schema(columns, spec)) for table in tables)
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["src_row"] for row in rows] == list(range(file.num_rows))
    assert {row["src_path"] for row in rows} == {path.name}
    assert all((row["chain"] == b"") == (row["error"] is not None) for row in rows)
    return rows


def errors(rows: list[dict[str, Any]]) -> dict[int, str]:
    return {row["src_row"]: row["error"]["code"] for row in rows if row["error"]}


def write_prompts(path: Path, prompts: list[str], **options: Any) -> Path:
    pq.write_table(pa.table({"prompt": prompts, "id": range(len(prompts))}), path, **options)
    return path


def test_rows_are_those_of_rendering_in_process_whatever_the_batches(tmp_path, monkeypatch):
    table = pa.table({"prompt": [f"row {n}" if n % 7 else None for n in range(500)], "id": range(500)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=130)
    spec = render_spec(passed_columns=("id",))
    wanted = render_block(block_of(table, "a.parquet", 0), spec).to_pylist()
    assert read(tmp_path / "a.parquet", spec) == wanted
    monkeypatch.setattr(blocks, "MANY_ROWS", 64)
    assert read(tmp_path / "a.parquet", spec) == wanted


def test_template_bombs_cost_the_rows_that_set_them_off(tmp_path):
    prompts = [f"row {n}" for n in range(60)]
    prompts[7], prompts[31], prompts[58] = "LOOP", "WIDE", "LONG"
    rows = read(write_prompts(tmp_path / "a.parquet", prompts), render_spec(BOMB_CHAT))
    assert errors(rows) == {7: "ROW_TIMEOUT", 31: "ROW_OOM", 58: "ROW_OOM"}
    assert "limits.row_cpu_s, 1.5 s" in rows[7]["error"]["message"]
    assert "limits.row_memory_bytes" in rows[31]["error"]["message"]


def test_rows_that_all_set_a_bomb_off_end_the_plan_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(planned_rows, "MAX_CONVICTED_IN_A_ROW", 2)
    path = write_prompts(tmp_path / "a.parquet", ["fine", *["LOOP"] * 4, "fine"])
    with pytest.raises(PreparationFailed, match=r"3 rows of a\.parquet, 3 of them one after the other, .* row 3:"):
        read(path, render_spec(BOMB_CHAT), RowLimits(0.5, 256 * MIB))


def test_bombs_that_are_no_neighbours_do_not_end_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(planned_rows, "MAX_CONVICTED_IN_A_ROW", 1)
    rows = read(
        write_prompts(tmp_path / "a.parquet", ["LOOP", "a", "LOOP"]), render_spec(BOMB_CHAT), RowLimits(0.5, 256 * MIB)
    )
    assert errors(rows) == {0: "ROW_TIMEOUT", 2: "ROW_TIMEOUT"}


def test_dictionary_bomb_costs_the_rows_that_are_too_large_and_little_memory(tmp_path, monkeypatch):
    """A few hundred bytes that are 20,000 texts of 8 MB: 160 GB."""
    path = tmp_path / "bomb.parquet"
    small, large = pa.array([f"row {n}" for n in range(5)]), pa.array(["a" * 8 * MIB])
    with pq.ParquetWriter(
        path, pa.schema({"prompt": pa.string()}), compression="zstd", dictionary_pagesize_limit=2**30
    ) as file:
        file.write_table(pa.table({"prompt": small}))
        indices = pa.repeat(0, 200).cast(pa.int32())
        file.write_table(
            pa.table({"prompt": pa.DictionaryArray.from_arrays(indices, large)}).cast(
                pa.schema({"prompt": pa.string()})
            )
        )
        file.write_table(pa.table({"prompt": small}))
    assert path.stat().st_size < 3000
    rows = read(path, render_spec(max_prompt_bytes=4 * MIB), RowLimits(30, 256 * MIB))
    assert errors(rows) == dict.fromkeys(range(5, 205), "PROMPT_TOO_LARGE")


def test_page_that_does_not_fit_into_memory_costs_the_rows_from_there_to_the_end_of_its_row_group(tmp_path):
    texts = [b"row"] * 300
    texts[4] = b"a" * 300 * MIB
    table = pa.table({"prompt": pa.array(texts, pa.binary()).view(pa.string())})
    pq.write_table(
        table, tmp_path / "a.parquet", compression="zstd", row_group_size=200, write_batch_size=1, use_dictionary=False
    )
    rows = read(tmp_path / "a.parquet", limits=RowLimits(60, 200 * MIB))
    lost = errors(rows)
    assert set(lost.values()) == {"ROW_OOM"}
    assert sorted(lost) == list(range(min(lost), 200))
    assert min(lost) <= 4
    assert "limits.row_memory_bytes, 209,715,200" in rows[4]["error"]["message"]


def test_text_that_is_too_large_is_never_made_a_string_of_pythons(tmp_path):
    """Which has four bytes a character if one of them is an emoji."""
    text = "a" * 60 * MIB + "\U0001f600"
    pq.write_table(pa.table({"prompt": [text]}), tmp_path / "a.parquet", compression="zstd")
    rows = read(tmp_path / "a.parquet", render_spec(max_prompt_bytes=4 * MIB), RowLimits(30, 320 * MIB))
    assert errors(rows) == {0: "PROMPT_TOO_LARGE"}


def flip_page_of(path: Path, row_group: int) -> None:
    """One byte in the middle of a row group's data."""
    chunk = pq.ParquetFile(path).metadata.row_group(row_group).column(0)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(content)


def test_corrupt_page_costs_the_rows_that_cannot_be_reached(tmp_path):
    prompts = [f"row {n} " + "x" * 200 for n in range(900)]
    path = write_prompts(
        tmp_path / "a.parquet", prompts, row_group_size=300, data_page_size=4096, use_dictionary=False,
        write_page_checksum=True, compression="none", write_batch_size=10,
    )  # fmt: skip
    flip_page_of(path, 1)
    rows = read(path, render_spec(passed_columns=("id",)))
    lost = errors(rows)
    assert set(lost.values()) == {"INPUT_CORRUPT"}
    assert sorted(lost) == list(range(min(lost), 600))
    assert 430 < min(lost) < 460, "rows of 64 that are read at once were read one by one"
    assert "cannot be decoded" in rows[500]["error"]["message"]
    assert [row["in:id"] for row in rows] == [None if n in lost else n for n in range(900)]


def test_required_columns_are_null_where_nothing_could_be_read(tmp_path):
    schema = pa.schema([pa.field("prompt", pa.string(), nullable=False), pa.field("id", pa.int64(), nullable=False)])
    table = pa.table({"prompt": [f"{n} " + "x" * 200 for n in range(50)], "id": range(50)}, schema=schema)
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, write_page_checksum=True, compression="none")
    flip_page_of(tmp_path / "a.parquet", 0)
    rows = read(tmp_path / "a.parquet", render_spec(passed_columns=("id",)))
    assert errors(rows) == dict.fromkeys(range(50), "INPUT_CORRUPT")
    assert {row["in:id"] for row in rows} == {None}


def test_file_that_is_gone_or_another_is_no_fault_of_its_rows(tmp_path):
    path = write_prompts(tmp_path / "a.parquet", ["a", "b"])
    (file,) = discover([str(path)])
    reader = PlannedRowReader(pa.schema({"prompt": pa.string()}), render_spec(), LIMITS)
    write_prompts(path, ["other"])
    with pytest.raises(InputChanged, match="must be as it was planned"):
        list(reader.read(file, 0, 2, range(2)))
    path.unlink()
    with pytest.raises(InputChanged, match="gone"):
        list(reader.read(file, 0, 2, range(2)))


def test_read_that_fails_is_no_fault_of_its_rows(proxy, tmp_path):
    from fault_proxy import Fault
    from s3fs import S3FileSystem

    S3FileSystem().put_file(str(write_prompts(tmp_path / "a.parquet", ["a"] * 100)), "data/a.parquet")
    (file,) = discover(["s3://data/a.parquet"])
    reader = PlannedRowReader(pa.schema({"prompt": pa.string()}), render_spec(), LIMITS)
    (table,) = reader.read(file, 0, 100, range(100))
    assert (table.num_rows, errors(table.to_pylist())) == (100, {})
    proxy.faults.append(Fault("status", "GET", "a.parquet", times=10**6, status=403, code="AccessDenied"))
    with pytest.raises(InputUnreadable, match=r"s3://data/a\.parquet cannot be read"):
        list(reader.read(file, 0, 100, range(100)))


def test_only_rows_that_are_wanted_are_convicted(tmp_path):
    path = write_prompts(tmp_path / "a.parquet", ["a", "LOOP", "LOOP", "b"])
    (file,) = discover([str(path)])
    reader = PlannedRowReader(pa.schema({"prompt": pa.string()}), render_spec(BOMB_CHAT), RowLimits(0.5, 256 * MIB))
    table = pa.concat_tables(reader.read(file, 0, 4, np.array([0, 2])))
    assert {row["src_row"]: row["error"] and row["error"]["code"] for row in table.to_pylist()} == {
        0: None,
        2: "ROW_TIMEOUT",
    }


@pytest.mark.parametrize(("death", "times"), [("crash", 4), ("memory", 4), ("time", 3)])
def test_child_that_dies_of_no_row_convicts_nobody(tmp_path, monkeypatch, death, times):
    """As when the kernel takes memory back: what it was at is done again, alone and once more."""
    path = write_prompts(tmp_path / "a.parquet", [f"row {n}" for n in range(50)])
    real, deaths = planned_rows.LimitedProcess.stream, iter([True] * times)
    monkeypatch.setattr(planned_rows, "CRASH_PAUSE_SECONDS", 0.0)

    def dying(self, function, *arguments):
        values = real(self, function, *arguments)
        if next(deaths, False):
            raise ChildDied(death)
        return values

    monkeypatch.setattr(planned_rows.LimitedProcess, "stream", dying)
    assert errors(read(path)) == {}


def test_too_many_bombs_in_one_task_end_the_plan_even_if_they_are_no_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(planned_rows, "MAX_CONVICTED", 1)
    path = write_prompts(tmp_path / "a.parquet", ["LOOP", "a", "LOOP"])
    with pytest.raises(PreparationFailed, match="2 rows of"):
        read(path, render_spec(BOMB_CHAT), RowLimits(0.5, 256 * MIB))


def test_sparse_rows_that_all_set_a_bomb_off_are_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(planned_rows, "MAX_CONVICTED_IN_A_ROW", 1)
    (file,) = discover([str(write_prompts(tmp_path / "a.parquet", ["LOOP", "a", "LOOP", "a"]))])
    reader = PlannedRowReader(pa.schema({"prompt": pa.string()}), render_spec(BOMB_CHAT), RowLimits(0.5, 256 * MIB))
    with pytest.raises(PreparationFailed, match="2 of them one after the other"):
        list(reader.read(file, 0, 4, np.array([0, 2])))


def test_store_that_denies_a_file_is_no_fault_of_its_rows(proxy, tmp_path):
    from fault_proxy import Fault
    from s3fs import S3FileSystem

    S3FileSystem().put_file(str(write_prompts(tmp_path / "a.parquet", ["a"] * 100)), "data/a.parquet")
    (file,) = discover(["s3://data/a.parquet"])
    proxy.faults.append(Fault("status", "HEAD", "a.parquet", times=10**6, status=403, code="AccessDenied"))
    reader = PlannedRowReader(pa.schema({"prompt": pa.string()}), render_spec(), LIMITS)
    with pytest.raises(InputUnreadable, match=r"s3://data/a\.parquet cannot be read"):
        list(reader.read(file, 0, 100, range(100)))


def test_no_rows_have_the_schema_all_the_same(tmp_path):
    columns = pa.schema({"prompt": pa.string(), "id": pa.int64()})
    spec = render_spec(TEXT, passed_columns=("id",))
    assert PlannedRowReader(columns, spec, LIMITS).empty().schema == planned_schema(columns, spec)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_store_that_takes_its_time_costs_no_process(bucket, proxy, monkeypatch, method):
    (file, *_) = discover(["s3://data/in"])
    columns = pa.schema([file.schema.field("prompt")])
    started, start = [], limited._start
    monkeypatch.setattr(limited, "_start", lambda descriptor: started.append(descriptor) or start(descriptor))
    monkeypatch.setattr(limited, "IDLE_FACTOR", 1)
    proxy.faults.append(Fault("hang", method, "data/in", seconds=6))
    reader = PlannedRowReader(columns, render_spec(), RowLimits(2.0, 256 * MIB))
    tables = list(reader.read(file, 0, file.num_rows, range(file.num_rows)))
    assert sum(table.num_rows for table in tables) == file.num_rows
    assert proxy.faults[0].times == 0, "nothing hung"
    assert len(started) == 1
